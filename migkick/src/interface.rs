//! The NICs of the VM, ordered by the likelihood of being the active one.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv6Addr;

use linux::interface;
use linux::netlink::Netlink;
use netlink_packet_route::route::RouteAttribute;

pub use linux::interface::Interface;

/// Name of the device that has the HoA as its address: one end of a veth pair.
pub const MAT_DEVICE: &str = "mat0";
/// Name of the other end of the veth pair.
pub const MAT_DEVICE_END: &str = "mat0-end";

/// Returns all Ethernet NICs except `mat0`: first those that are up, then those with a default
/// route, then those with a global address, then by index.
///
/// # Errors
///
/// The error of the kernel.
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
        // The unreachable default route of every namespace has no gateway.
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
