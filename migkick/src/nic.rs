//! Preparing the idle NIC for the destination, and undoing it.
//!
//! Before the move the destination's network is not there yet, so the new address must not
//! attract traffic: it is set without duplicate address detection (DstAgent defends it) and
//! without the prefix route, and Router Advertisements of the source's network are not taken.
//! Only DstAgent is routed to, by a host route.
//!
//! A VM may come back to a network: the address that it had there is still set, without a route.
//!
//! | when | what |
//! |---|---|
//! | [`IdleNic::prepare`] | `accept_ra` and `autoconf` off, NIC up, address, host route to DstAgent |
//! | [`IdleNic::join`] | prefix route, and default route where the router is known; `accept_ra` and `autoconf` as before, Router Solicitation |
//! | [`IdleNic::settle`] | the same, unless it is done; host route and routes of earlier moves removed |
//! | dropped before that | everything back as it was |
//! | [`leave`] | routes of the NIC that was active, which lead nowhere from the new network |

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use socket2::{Domain, Protocol, Socket, Type};

use crate::interface::Interface;
use linux::netlink::Netlink;

/// Who has made a route (`rtm_protocol`), by which migkick knows its own: a number that no routing
/// daemon has.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(74);

/// Why the NIC cannot be prepared.
#[derive(Debug, thiserror::Error)]
#[error("Cannot {step} on {interface}; run migkick as root, or go without with --no-configure")]
pub(crate) struct NicError {
    /// What was tried.
    step: &'static str,
    /// The NIC.
    interface: String,
    /// Why it failed.
    source: io::Error,
}

/// What the NIC is prepared for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// New address.
    pub(crate) address: Ipv6Addr,
    /// Length of its prefix, bits.
    pub(crate) prefix_length: u8,
    /// DstAgent.
    pub(crate) agent_address: Ipv6Addr,
    /// First router of the network, where it need not be waited for.
    pub(crate) router: Option<Ipv6Addr>,
}

/// One thing that was done.
enum Done {
    Sysctl { path: PathBuf, before: String },
    Up,
    Address,
    HostRoute,
    PrefixRoute,
    DefaultRoute,
}

/// A prepared NIC. Dropping it undoes the preparation unless [`IdleNic::settle`] was called.
pub(crate) struct IdleNic {
    netlink: Netlink,
    interface: Interface,
    plan: Plan,
    done: Vec<Done>,
    joined: bool,
}

impl IdleNic {
    /// Prepares `interface`. On an error everything is as it was.
    pub(crate) fn prepare(
        netlink: Netlink,
        interface: Interface,
        plan: Plan,
    ) -> Result<Self, NicError> {
        let mut nic = Self {
            netlink,
            interface,
            plan,
            done: Vec::new(),
            joined: false,
        };
        nic.set_sysctl("accept_ra", "0")?;
        nic.set_sysctl("autoconf", "0")?;
        if !nic.interface.up {
            let message = nic.link(true);
            nic.change("set the link up", message, 0)?;
            nic.done.push(Done::Up);
        }
        let message = RouteNetlinkMessage::NewAddress(nic.address());
        let added = nic.netlink.change(message, NLM_F_CREATE | NLM_F_EXCL);
        match added {
            Ok(()) => nic.done.push(Done::Address),
            // From an earlier stay in this network; it was there before and stays.
            Err(error) if error.is_one_of(&[libc::EEXIST]) => {}
            Err(error) => return Err(nic.error("add an address", error)),
        }
        let message = RouteNetlinkMessage::NewRoute(nic.host_route());
        nic.change("add a route", message, NLM_F_CREATE | NLM_F_REPLACE)?;
        nic.done.push(Done::HostRoute);
        Ok(nic)
    }

    /// The NIC's name.
    pub(crate) fn name(&self) -> &str {
        &self.interface.name
    }

    /// The address that was set.
    pub(crate) fn plan_address(&self) -> Ipv6Addr {
        self.plan.address
    }

    /// Makes the new network usable, as the VM seems to be there. What fails is returned and the rest
    /// done all the same. It is undone with everything else.
    pub(crate) fn join(&mut self) -> Vec<NicError> {
        if std::mem::replace(&mut self.joined, true) {
            return Vec::new();
        }
        let mut errors = Vec::new();
        let route = RouteNetlinkMessage::NewRoute(self.prefix_route());
        match self.change("add the prefix route", route, NLM_F_CREATE | NLM_F_REPLACE) {
            Ok(()) => self.done.push(Done::PrefixRoute),
            Err(error) => errors.push(error),
        }
        if let Some(router) = self.plan.router {
            let route = RouteNetlinkMessage::NewRoute(self.default_route(router));
            match self.change("add the default route", route, NLM_F_CREATE | NLM_F_REPLACE) {
                Ok(()) => self.done.push(Done::DefaultRoute),
                Err(error) => errors.push(error),
            }
        }
        for done in &self.done {
            if let Done::Sysctl { path, before } = done {
                errors.extend(self.restore(path, before).err());
            }
        }
        let solicited = solicit_router(&self.interface);
        errors.extend(
            solicited
                .map_err(|e| self.error("ask for routers", e))
                .err(),
        );
        errors
    }

    /// Joins the new network for good, now that the VM is there: there is no way back any more.
    pub(crate) fn settle(mut self) -> Vec<NicError> {
        let mut errors = self.join();
        errors.extend(self.remove_earlier_routes().err());
        let done = std::mem::take(&mut self.done);
        if done.iter().any(|it| matches!(it, Done::PrefixRoute)) {
            let message = RouteNetlinkMessage::DelRoute(self.host_route());
            errors.extend(self.change("remove the host route", message, 0).err());
        }
        errors
    }

    /// Removes the prefix routes of networks that the VM has left: they would draw its traffic to
    /// these networks here.
    fn remove_earlier_routes(&mut self) -> Result<(), NicError> {
        let routes = self
            .netlink
            .ipv6_routes()
            .map_err(|error| self.error("read the routes", error))?;
        let oif = RouteAttribute::Oif(self.interface.ifindex);
        let mut own = vec![self.prefix_route()];
        own.extend(self.plan.router.map(|router| self.default_route(router)));
        for route in routes {
            if route.header.protocol == PROTOCOL
                && route.header.destination_prefix_length < 128
                && route.attributes.contains(&oif)
                && !own.iter().any(|it| leads_where(it, &route))
            {
                let message = RouteNetlinkMessage::DelRoute(route);
                self.change("remove a route of an earlier move", message, 0)?;
            }
        }
        Ok(())
    }

    fn undo(&mut self) -> Vec<NicError> {
        let mut errors = Vec::new();
        for done in std::mem::take(&mut self.done).into_iter().rev() {
            let result = match done {
                Done::Sysctl { path, before } => self.restore(&path, &before),
                Done::Up => {
                    let message = self.link(false);
                    self.change("set the link down", message, 0)
                }
                Done::Address => {
                    let message = RouteNetlinkMessage::DelAddress(self.address());
                    self.change("remove the address", message, 0)
                }
                Done::HostRoute => {
                    let message = RouteNetlinkMessage::DelRoute(self.host_route());
                    self.change("remove the host route", message, 0)
                }
                Done::PrefixRoute => {
                    let message = RouteNetlinkMessage::DelRoute(self.prefix_route());
                    self.change("remove the prefix route", message, 0)
                }
                Done::DefaultRoute => match self.plan.router {
                    Some(router) => {
                        let message = RouteNetlinkMessage::DelRoute(self.default_route(router));
                        self.change("remove the default route", message, 0)
                    }
                    None => Ok(()),
                },
            };
            errors.extend(result.err());
        }
        errors
    }

    fn set_sysctl(&mut self, name: &str, value: &str) -> Result<(), NicError> {
        let path: PathBuf = ["/proc/sys/net/ipv6/conf", &self.interface.name, name]
            .iter()
            .collect();
        let before = std::fs::read_to_string(&path)
            .map_err(|error| self.error("read the IPv6 settings", error))?;
        std::fs::write(&path, value)
            .map_err(|error| self.error("change the IPv6 settings", error))?;
        self.done.push(Done::Sysctl { path, before });
        Ok(())
    }

    fn restore(&self, path: &std::path::Path, before: &str) -> Result<(), NicError> {
        std::fs::write(path, before.trim())
            .map_err(|error| self.error("restore the IPv6 settings", error))
    }

    fn change(
        &mut self,
        step: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NicError> {
        let result = self.netlink.change(message, flags);
        result.map_err(|error| self.error(step, error))
    }

    fn error(&self, step: &'static str, error: impl Into<io::Error>) -> NicError {
        NicError {
            step,
            interface: self.interface.name.clone(),
            source: error.into(),
        }
    }

    fn link(&self, up: bool) -> RouteNetlinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = self.interface.ifindex;
        message.header.change_mask = LinkFlags::Up;
        if up {
            message.header.flags = LinkFlags::Up;
        }
        RouteNetlinkMessage::SetLink(message)
    }

    fn address(&self) -> AddressMessage {
        let prefix = (self.plan.address, self.plan.prefix_length);
        address_message(self.interface.ifindex, prefix, AddressFlags::Nodad)
    }

    fn host_route(&self) -> RouteMessage {
        let mut route = self.route(self.plan.agent_address, 128);
        // DstAgent must be reached from the new address, or its answer would go elsewhere.
        let source = RouteAddress::Inet6(self.plan.address);
        route.attributes.push(RouteAttribute::PrefSource(source));
        route
    }

    fn prefix_route(&self) -> RouteMessage {
        let length = self.plan.prefix_length;
        let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
        let prefix = Ipv6Addr::from_bits(self.plan.address.to_bits() & !host);
        let mut route = self.route(prefix, length);
        // The metric that the kernel gives prefix routes.
        route.attributes.push(RouteAttribute::Priority(256));
        route
    }

    fn default_route(&self, router: Ipv6Addr) -> RouteMessage {
        let mut route = self.route(Ipv6Addr::UNSPECIFIED, 0);
        let unspecified = |it: &RouteAttribute| !matches!(it, RouteAttribute::Destination(_));
        route.attributes.retain(unspecified);
        let router = RouteAddress::Inet6(router);
        route.attributes.push(RouteAttribute::Gateway(router));
        // The metric that the kernel gives the routes of advertisements.
        route.attributes.push(RouteAttribute::Priority(1024));
        route
    }

    fn route(&self, destination: Ipv6Addr, length: u8) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = AddressFamily::Inet6;
        route.header.destination_prefix_length = length;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.protocol = PROTOCOL;
        route.header.scope = RouteScope::Universe;
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet6(destination)),
            RouteAttribute::Oif(self.interface.ifindex),
        ];
        route
    }
}

impl Drop for IdleNic {
    fn drop(&mut self) {
        for error in self.undo() {
            let source = &error.source;
            eprintln!("{error}: {source}");
        }
    }
}

/// A message about an address of a NIC, without a prefix route.
pub(crate) fn address_message(
    ifindex: u32,
    (address, length): (Ipv6Addr, u8),
    flags: AddressFlags,
) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.prefix_len = length;
    if flags.contains(AddressFlags::Nodad) {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.header.scope = AddressScope::Universe;
    message.header.index = ifindex;
    let address = IpAddr::V6(address);
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
        AddressAttribute::Flags(flags | AddressFlags::Noprefixroute),
    ];
    message
}

/// Whether two routes are to the same destination, by the same router if any.
fn leads_where(one: &RouteMessage, other: &RouteMessage) -> bool {
    let where_to = |route: &RouteMessage| {
        let attributes = route.attributes.iter();
        let wanted = attributes.filter(|it| {
            matches!(
                it,
                RouteAttribute::Destination(_) | RouteAttribute::Gateway(_)
            )
        });
        let mut wanted: Vec<RouteAttribute> = wanted.cloned().collect();
        wanted.sort_by_key(|it| matches!(it, RouteAttribute::Gateway(_)));
        (route.header.destination_prefix_length, wanted)
    };
    where_to(one) == where_to(other)
}

/// Removes the routes of a NIC that lead nowhere since the VM is elsewhere: default routes, and the
/// one to the network of `address`. What else the NIC has stays.
pub(crate) fn leave(netlink: &mut Netlink, ifindex: u32, address: Ipv6Addr) -> io::Result<()> {
    for route in netlink.ipv6_routes()? {
        let length = route.header.destination_prefix_length;
        let mut prefix = Ipv6Addr::UNSPECIFIED;
        for attribute in &route.attributes {
            if let RouteAttribute::Destination(RouteAddress::Inet6(destination)) = attribute {
                prefix = *destination;
            }
        }
        let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
        let covers = (prefix.to_bits() ^ address.to_bits()) & !host == 0;
        let unicast = route.header.kind == RouteType::Unicast
            && route.header.table == RouteHeader::RT_TABLE_MAIN;
        if unicast
            && covers
            && length < 128
            && route.attributes.contains(&RouteAttribute::Oif(ifindex))
        {
            netlink.change(RouteNetlinkMessage::DelRoute(route), 0)?;
        }
    }
    Ok(())
}

/// Sends a Router Solicitation (RFC 4861 §4.1): the kernel sends none when `accept_ra` is turned
/// on, and the next unsolicited Advertisement may be minutes away.
fn solicit_router(interface: &Interface) -> io::Result<()> {
    const ROUTER_SOLICITATION: [u8; 8] = [133, 0, 0, 0, 0, 0, 0, 0];
    const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    socket.bind_device(Some(interface.name.as_bytes()))?;
    socket.set_multicast_hops_v6(255)?;
    // The kernel fills the checksum in for ICMPv6 sockets (RFC 3542 §3.1).
    let to = SocketAddrV6::new(ALL_ROUTERS, 0, 0, interface.ifindex);
    socket.send_to(&ROUTER_SOLICITATION, &to.into()).map(drop)
}

#[cfg(test)]
mod tests;
