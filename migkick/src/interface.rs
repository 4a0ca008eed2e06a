//! The VM's NICs: which there are, and which of them is likely to be the active one.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv6Addr;

use linux::interface;
use linux::netlink::Netlink;
use netlink_packet_route::route::RouteAttribute;

pub use linux::interface::Interface;

/// Name of the device that carries the HoA: one end of a veth pair.
pub const MAT_DEVICE: &str = "mat0";
/// Name of the other end of the veth pair.
pub const MAT_DEVICE_END: &str = "mat0-end";

/// All Ethernet NICs, the likeliest to be active first: one with a default route, then one with
/// a global address, then by index. `mat0` is none.
///
/// # Errors
///
/// What the kernel says.
pub fn list(netlink: &mut Netlink) -> io::Result<Vec<Interface>> {
    let mut interfaces: Vec<Interface> = netlink
        .links()?
        .iter()
        .filter_map(Interface::of)
        .filter(|interface| !matches!(interface.name.as_str(), MAT_DEVICE | MAT_DEVICE_END))
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

fn default_routes(netlink: &mut Netlink) -> io::Result<BTreeSet<u32>> {
    let routes = netlink.ipv6_routes()?.into_iter();
    Ok(routes
        .filter(|route| route.header.destination_prefix_length == 0)
        // An unreachable default route, which every namespace has, has no gateway.
        .filter(|route| {
            let gateway = |it: &RouteAttribute| matches!(it, RouteAttribute::Gateway(_));
            route.attributes.iter().any(gateway)
        })
        .flat_map(|route| route.attributes)
        .filter_map(|attribute| match attribute {
            RouteAttribute::Oif(ifindex) => Some(ifindex),
            _ => None,
        })
        .collect())
}

fn global_addresses(netlink: &mut Netlink) -> io::Result<BTreeSet<u32>> {
    let is_global = |address: Ipv6Addr| !address.is_unicast_link_local() && !address.is_loopback();
    let addresses = netlink.ipv6_addresses()?;
    Ok(addresses
        .iter()
        .filter(|message| interface::ipv6_address(message).is_some_and(is_global))
        .map(|message| message.header.index)
        .collect())
}
