//! `mat0`: the device with the HoA and the route of the home prefix.
//!
//! The device is a `dummy` if the kernel has that type, otherwise one end of a veth pair whose
//! other end nobody reads. No packet really leaves by the device: `mat_out` takes each packet
//! before.
//!
//! | on it | why |
//! |---|---|
//! | HoA/128, no duplicate address detection | the address is on no link |
//! | route of the home prefix, from the HoA | peers' HoAs, and whatever of the kind is unknown yet |
//! | MTU: the least of the NICs' | a packet leaves by any of them |
//! | no Router Solicitations, no neighbour discovery | nobody answers |
//! | forwarding | the helper that looks next hops up asks for it; without that of `all` nothing is forwarded |

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{DatapathError, routes};
use crate::interface::{MAT_DEVICE, MAT_DEVICE_END};
use linux::interface::{self, Interface, ipv6_address};
use linux::netlink::{Netlink, RequestError};

/// Protocol number of our routes, the same as that of the NICs' routes.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(74);
/// Minimum IPv6 MTU, bytes (RFC 8200 §5).
const LEAST_MTU: u32 = 1280;

/// Properties of a link in the kernel.
struct Link {
    ifindex: u32,
    mac: [u8; 6],
    flags: LinkFlags,
    /// Whether the link has a type that this module creates.
    own_kind: bool,
}

/// The device; see the [module documentation](self).
pub(super) struct Device {
    netlink: Netlink,
    pub(super) ifindex: u32,
    pub(super) mac: [u8; 6],
    hoa: Ipv6Addr,
    home: (Ipv6Addr, u8),
}

impl Device {
    /// Creates the device, or adopts the device of an earlier daemon with the same HoA.
    pub(super) fn make(
        hoa: Ipv6Addr,
        home: (Ipv6Addr, u8),
        adopt: bool,
    ) -> Result<Self, DatapathError> {
        let mut netlink = Netlink::open().map_err(error("talk to the kernel"))?;
        let mut link = find(&mut netlink, MAT_DEVICE)?;
        if let Some(found) = &link
            && !found.own_kind
        {
            return Err(DatapathError::DeviceTaken);
        }
        if !adopt && let Some(found) = link.take() {
            remove(&mut netlink, found.ifindex)?;
        }
        let link = match link {
            Some(link) => link,
            None => {
                create(&mut netlink).map_err(error("make the device"))?;
                find(&mut netlink, MAT_DEVICE)?
                    .ok_or_else(|| error("find the device")(io::ErrorKind::NotFound))?
            }
        };
        let mut device = Self {
            netlink,
            ifindex: link.ifindex,
            mac: link.mac,
            hoa,
            home,
        };
        device.configure()?;
        Ok(device)
    }

    fn configure(&mut self) -> Result<(), DatapathError> {
        for (name, setting, value) in [
            (MAT_DEVICE, "accept_ra", "0"),
            (MAT_DEVICE, "autoconf", "0"),
            (MAT_DEVICE, "router_solicitations", "0"),
            (MAT_DEVICE, "forwarding", "1"),
            (MAT_DEVICE_END, "disable_ipv6", "1"),
        ] {
            let path = format!("/proc/sys/net/ipv6/conf/{name}/{setting}");
            match fs::write(path, value) {
                Err(e) if name == MAT_DEVICE_END && e.kind() == io::ErrorKind::NotFound => {}
                result => result.map_err(error("change the IPv6 settings"))?,
            }
        }
        if let Some(end) = find(&mut self.netlink, MAT_DEVICE_END)? {
            set_flags(&mut self.netlink, end.ifindex, LinkFlags::Up, true)
                .map_err(error("set the link up"))?;
        }
        let flags = LinkFlags::Up | LinkFlags::Noarp;
        set_flags(&mut self.netlink, self.ifindex, flags, true)
            .map_err(error("set the link up"))?;
        let address = RouteNetlinkMessage::NewAddress(self.address());
        self.netlink
            .change(address, NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(error("add the home address"))?;
        self.route()
    }

    /// Replaces the home route. The kernel thereby discards what it learnt about the paths to
    /// peers.
    pub(super) fn route(&mut self) -> Result<(), DatapathError> {
        let (prefix, length) = self.home;
        let mut route = RouteMessage::default();
        route.header.address_family = AddressFamily::Inet6;
        route.header.destination_prefix_length = length;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.protocol = PROTOCOL;
        route.header.scope = RouteScope::Universe;
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet6(prefix)),
            RouteAttribute::Oif(self.ifindex),
            RouteAttribute::PrefSource(RouteAddress::Inet6(self.hoa)),
            RouteAttribute::Priority(256),
        ];
        self.netlink
            .change(
                RouteNetlinkMessage::NewRoute(route),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
            .map_err(error("route the home prefix"))
    }

    /// Sets the MTU of the device to the least MTU of the NICs.
    pub(super) fn fit(&mut self, nics: &[Interface]) -> Result<(), DatapathError> {
        let least = nics.iter().filter_map(mtu).min();
        let Some(least) = least else {
            return Ok(());
        };
        let least = least.max(LEAST_MTU);
        for name in [MAT_DEVICE_END, MAT_DEVICE] {
            let Some(link) = find(&mut self.netlink, name)? else {
                continue;
            };
            let mut message = LinkMessage::default();
            message.header.index = link.ifindex;
            message.attributes = vec![LinkAttribute::Mtu(least)];
            self.netlink
                .change(RouteNetlinkMessage::SetLink(message), 0)
                .map_err(error("set the MTU"))?;
        }
        Ok(())
    }

    /// Returns a usable link-local address of a NIC.
    pub(super) fn link_local(&mut self, ifindex: u32) -> Result<Option<Ipv6Addr>, DatapathError> {
        let addresses = self
            .netlink
            .ipv6_addresses()
            .map_err(error("read the addresses"))?;
        let settled = addresses.iter().filter(|it| {
            it.header.index == ifindex && !it.header.flags.contains(AddressHeaderFlags::Tentative)
        });
        Ok(settled
            .filter_map(ipv6_address)
            .find(Ipv6Addr::is_unicast_link_local))
    }

    /// Enables or disables all-multicast on a NIC: its filter does not know the groups that `mat0`
    /// has joined. Returns true if the setting changed.
    pub(super) fn all_multicast(&mut self, ifindex: u32, on: bool) -> Result<bool, DatapathError> {
        let Some(link) = find_by(&mut self.netlink, |it, _| it == ifindex)? else {
            return Ok(false);
        };
        if link.flags.contains(LinkFlags::Allmulti) == on {
            return Ok(false);
        }
        set_flags(&mut self.netlink, ifindex, LinkFlags::Allmulti, on)
            .map_err(error("let the NIC take all multicast"))?;
        Ok(true)
    }

    /// Updates the tables of the NICs, see [`routes::follow`].
    pub(super) fn follow_routes(
        &mut self,
        nics: &[Interface],
        planned: &[RouteMessage],
    ) -> Result<(), DatapathError> {
        routes::follow(&mut self.netlink, nics, planned)
            .map_err(error("copy the routes of the NICs"))
    }

    /// Removes the table of a NIC, see [`routes::forget`].
    pub(super) fn forget_routes(&mut self, nic: &Interface) -> Result<(), DatapathError> {
        routes::forget(&mut self.netlink, nic).map_err(error("remove the routes of a NIC"))
    }

    /// Deletes the device with its address and routes.
    pub(super) fn remove(mut self) -> Result<(), DatapathError> {
        remove(&mut self.netlink, self.ifindex)
    }

    fn address(&self) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet6;
        message.header.prefix_len = 128;
        message.header.flags = AddressHeaderFlags::Nodad;
        message.header.scope = AddressScope::Universe;
        message.header.index = self.ifindex;
        let address = IpAddr::V6(self.hoa);
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
            AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute),
        ];
        message
    }
}

/// IPv6 MTU of a NIC; Router Advertisements may have lowered it.
fn mtu(nic: &Interface) -> Option<u32> {
    let path = format!("/proc/sys/net/ipv6/conf/{}/mtu", nic.name);
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn create(netlink: &mut Netlink) -> Result<(), RequestError> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(MAT_DEVICE.to_owned()),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Dummy)]),
    ];
    let flags = NLM_F_CREATE | NLM_F_EXCL;
    let made = netlink.change(RouteNetlinkMessage::NewLink(message.clone()), flags);
    match made {
        Err(error) if error.is_one_of(&[libc::EOPNOTSUPP]) => {}
        result => return result,
    }
    let mut end = LinkMessage::default();
    end.attributes = vec![LinkAttribute::IfName(MAT_DEVICE_END.to_owned())];
    message.attributes = vec![
        LinkAttribute::IfName(MAT_DEVICE.to_owned()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(end))),
        ]),
    ];
    netlink.change(RouteNetlinkMessage::NewLink(message), flags)
}

fn remove(netlink: &mut Netlink, ifindex: u32) -> Result<(), DatapathError> {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    netlink
        .change(RouteNetlinkMessage::DelLink(message), 0)
        .map_err(error("remove the device"))
}

fn set_flags(
    netlink: &mut Netlink,
    ifindex: u32,
    flags: LinkFlags,
    on: bool,
) -> Result<(), RequestError> {
    let mut message = LinkMessage::default();
    message.header.index = ifindex;
    message.header.change_mask = flags;
    if on {
        message.header.flags = flags;
    }
    netlink.change(RouteNetlinkMessage::SetLink(message), 0)
}

fn find(netlink: &mut Netlink, name: &str) -> Result<Option<Link>, DatapathError> {
    find_by(netlink, |_, it| it == name)
}

fn find_by(
    netlink: &mut Netlink,
    wanted: impl Fn(u32, &str) -> bool,
) -> Result<Option<Link>, DatapathError> {
    let links = netlink.links().map_err(error("read the interfaces"))?;
    Ok(links
        .iter()
        .find(|link| interface::name(link).is_some_and(|name| wanted(link.header.index, name)))
        .map(|link| Link {
            ifindex: link.header.index,
            mac: interface::mac(link).unwrap_or_default(),
            flags: link.header.flags,
            own_kind: matches!(
                interface::kind(link),
                Some(InfoKind::Dummy | InfoKind::Veth)
            ),
        }))
}

fn error<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> DatapathError {
    move |error| DatapathError::Device {
        step,
        source: error.into(),
    }
}
