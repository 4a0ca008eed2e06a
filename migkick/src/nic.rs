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
//! | [`IdleNic::settle`] | prefix route instead of the host route and of those of earlier moves, `accept_ra` and `autoconf` as before, Router Solicitation |
//! | dropped before that | everything back as it was |

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
use crate::netlink::Netlink;

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
}

/// One thing that was done.
enum Done {
    Sysctl { path: PathBuf, before: String },
    Up,
    Address,
    HostRoute,
}

/// A prepared NIC. Dropping it undoes the preparation unless [`IdleNic::settle`] was called.
pub(crate) struct IdleNic {
    netlink: Netlink,
    interface: Interface,
    plan: Plan,
    done: Vec<Done>,
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
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
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

    /// Joins the new network, now that the VM is there. What fails is returned and the rest done
    /// all the same: there is no way back any more.
    pub(crate) fn settle(mut self) -> Vec<NicError> {
        let mut errors = Vec::new();
        errors.extend(self.remove_earlier_routes().err());
        let route = RouteNetlinkMessage::NewRoute(self.prefix_route());
        let added = self.change("add the prefix route", route, NLM_F_CREATE | NLM_F_REPLACE);
        for done in std::mem::take(&mut self.done) {
            let result = match done {
                Done::Sysctl { path, before } => self.restore(&path, &before),
                Done::HostRoute if added.is_ok() => {
                    let message = RouteNetlinkMessage::DelRoute(self.host_route());
                    self.change("remove the host route", message, 0)
                }
                Done::Up | Done::Address | Done::HostRoute => Ok(()),
            };
            errors.extend(result.err());
        }
        errors.extend(added.err());
        let solicited = solicit_router(&self.interface);
        errors.extend(
            solicited
                .map_err(|e| self.error("ask for routers", e))
                .err(),
        );
        errors
    }

    /// Removes the prefix routes of networks that the VM has left: they would draw its traffic to
    /// these networks here.
    fn remove_earlier_routes(&mut self) -> Result<(), NicError> {
        let mut all = RouteMessage::default();
        all.header.address_family = AddressFamily::Inet6;
        let routes = self
            .netlink
            .dump(RouteNetlinkMessage::GetRoute(all))
            .map_err(|error| self.error("read the routes", error))?;
        let oif = RouteAttribute::Oif(self.interface.ifindex);
        for route in routes {
            if let RouteNetlinkMessage::NewRoute(route) = route
                && route.header.protocol == PROTOCOL
                && route.header.destination_prefix_length < 128
                && route.attributes.contains(&oif)
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

    fn error(&self, step: &'static str, source: io::Error) -> NicError {
        NicError {
            step,
            interface: self.interface.name.clone(),
            source,
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
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet6;
        message.header.prefix_len = self.plan.prefix_length;
        message.header.flags = AddressHeaderFlags::Nodad;
        message.header.scope = AddressScope::Universe;
        message.header.index = self.interface.ifindex;
        let address = IpAddr::V6(self.plan.address);
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
            AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute),
        ];
        message
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
