//! Interfaces with their addresses and routes, read by rtnetlink.

use std::io;
use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink::{Netlink, RequestError};

/// An Ethernet interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Index in the network namespace.
    pub ifindex: u32,
    /// Name at the time of the dump (`IFLA_IFNAME`).
    pub name: String,
    /// Ethernet address (`IFLA_ADDRESS`).
    pub mac: [u8; 6],
    /// Whether the interface is administratively up (`IFF_UP`).
    pub up: bool,
}

impl Interface {
    /// Converts a link; `None` for the loopback and for links other than Ethernet.
    pub fn of(link: &LinkMessage) -> Option<Self> {
        let is_ethernet = link.header.link_layer_type == LinkLayerType::Ether;
        if !is_ethernet || link.header.flags.contains(LinkFlags::Loopback) {
            return None;
        }
        Some(Self {
            ifindex: link.header.index,
            name: name(link)?.to_owned(),
            mac: mac(link)?,
            up: link.header.flags.contains(LinkFlags::Up),
        })
    }
}

impl Netlink {
    /// Returns all interfaces of the network namespace.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn links(&mut self) -> io::Result<Vec<LinkMessage>> {
        let answers = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(links.collect())
    }

    /// Returns one interface.
    ///
    /// # Errors
    ///
    /// [`RequestError`], for instance because the interface does not exist.
    pub fn link(&mut self, ifindex: u32) -> Result<LinkMessage, RequestError> {
        let mut request = LinkMessage::default();
        request.header.index = ifindex;
        match self.get(RouteNetlinkMessage::GetLink(request))? {
            RouteNetlinkMessage::NewLink(link) => Ok(link),
            _ => Err(RequestError::Answer),
        }
    }

    /// Returns the IPv6 addresses of all interfaces.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn ipv6_addresses(&mut self) -> io::Result<Vec<AddressMessage>> {
        let mut request = AddressMessage::default();
        request.header.family = AddressFamily::Inet6;
        let answers = self.dump(RouteNetlinkMessage::GetAddress(request))?;
        let addresses = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(address) => Some(address),
            _ => None,
        });
        Ok(addresses.collect())
    }

    /// Returns the IPv6 routes of all tables.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn ipv6_routes(&mut self) -> io::Result<Vec<RouteMessage>> {
        let mut request = RouteMessage::default();
        request.header.address_family = AddressFamily::Inet6;
        let answers = self.dump(RouteNetlinkMessage::GetRoute(request))?;
        let routes = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        Ok(routes.collect())
    }
}

/// Returns the name of a link (`IFLA_IFNAME`).
pub fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|it| match it {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

/// Returns the Ethernet address of a link (`IFLA_ADDRESS`).
pub fn mac(link: &LinkMessage) -> Option<[u8; 6]> {
    link.attributes.iter().find_map(|it| match it {
        LinkAttribute::Address(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    })
}

/// Returns the attributes in `IFLA_LINKINFO`: the kind of the link and, for a port, the kind of its
/// controller.
pub fn info(link: &LinkMessage) -> impl Iterator<Item = &LinkInfo> {
    let infos = link.attributes.iter().filter_map(|it| match it {
        LinkAttribute::LinkInfo(info) => Some(info),
        _ => None,
    });
    infos.flatten()
}

/// Returns the kind of a link (`IFLA_INFO_KIND`).
pub fn kind(link: &LinkMessage) -> Option<&InfoKind> {
    info(link).find_map(|it| match it {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })
}

/// Returns the IPv6 address of a message; `None` for another address family.
pub fn ipv6_address(message: &AddressMessage) -> Option<Ipv6Addr> {
    message.attributes.iter().find_map(|it| match it {
        AddressAttribute::Address(IpAddr::V6(address)) => Some(*address),
        _ => None,
    })
}

/// Returns the flags of an address from its attribute; the header holds only the first eight flags.
pub fn address_flags(message: &AddressMessage) -> AddressFlags {
    let flags = message.attributes.iter().find_map(|it| match it {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    flags.unwrap_or_else(|| AddressFlags::from_bits_retain(message.header.flags.bits().into()))
}
