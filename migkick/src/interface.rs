//! The VM's NICs: which there are, and which of them is likely to be the active one.

use std::collections::BTreeSet;
use std::io;

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::datapath;
use linux::netlink::Netlink;

/// An Ethernet NIC.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its index.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// Whether it is up.
    pub up: bool,
}

/// All Ethernet NICs, the likeliest to be active first: one with a default route, then one with
/// a global address, then by index. `mat0` is none.
///
/// # Errors
///
/// What the kernel says.
pub fn list(netlink: &mut Netlink) -> io::Result<Vec<Interface>> {
    let mut interfaces: Vec<Interface> = netlink
        .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewLink(link) => interface(link),
            _ => None,
        })
        .collect();
    let routed = default_routes(netlink)?;
    let addressed = global_addresses(netlink)?;
    interfaces.sort_by_key(|interface| {
        (
            !interface.up,
            !routed.contains(&interface.ifindex),
            !addressed.contains(&interface.ifindex),
            interface.ifindex,
        )
    });
    Ok(interfaces)
}

fn interface(link: LinkMessage) -> Option<Interface> {
    let ethernet = link.header.link_layer_type == LinkLayerType::Ether;
    if !ethernet || link.header.flags.contains(LinkFlags::Loopback) {
        return None;
    }
    let mut name = None;
    let mut mac = None;
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text),
            LinkAttribute::Address(bytes) => mac = bytes.try_into().ok(),
            _ => {}
        }
    }
    let name = name?;
    if datapath::is_own_device(&name) {
        return None;
    }
    Some(Interface {
        ifindex: link.header.index,
        name,
        mac: mac?,
        up: link.header.flags.contains(LinkFlags::Up),
    })
}

fn default_routes(netlink: &mut Netlink) -> io::Result<BTreeSet<u32>> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet6;
    let routes = netlink.dump(RouteNetlinkMessage::GetRoute(request))?;
    Ok(routes
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) if route.header.destination_prefix_length == 0 => {
                // An unreachable default route, which every namespace has, has no gateway.
                let gateway = |a: &RouteAttribute| matches!(a, RouteAttribute::Gateway(_));
                route.attributes.iter().any(gateway).then_some(route)
            }
            _ => None,
        })
        .flat_map(|route| route.attributes)
        .filter_map(|attribute| match attribute {
            RouteAttribute::Oif(ifindex) => Some(ifindex),
            _ => None,
        })
        .collect())
}

fn global_addresses(netlink: &mut Netlink) -> io::Result<BTreeSet<u32>> {
    let mut request = AddressMessage::default();
    request.header.family = AddressFamily::Inet6;
    let addresses = netlink.dump(RouteNetlinkMessage::GetAddress(request))?;
    let global = |attribute: &AddressAttribute| match attribute {
        AddressAttribute::Address(std::net::IpAddr::V6(address)) => {
            !address.is_unicast_link_local() && !address.is_loopback()
        }
        _ => false,
    };
    Ok(addresses
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewAddress(address) => {
                let ifindex = address.header.index;
                address.attributes.iter().any(global).then_some(ifindex)
            }
            _ => None,
        })
        .collect())
}
