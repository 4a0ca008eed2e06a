//! Multicast joins that the kernel holds without a process.
//!
//! When a multicast address is added to an interface with `IFA_F_MCAUTOJOIN`, a socket of the
//! kernel joins the address, from any source, until the address is deleted (compare `ip address add
//! ff1e::1 dev X autojoin`). The join survives the process, also after `kill -9`, and the next
//! process finds the address by its protocol number ([`PROTOCOL`]).
//!
//! Limits: a join of this kind has no source list (only sockets have, see [`super::membership`]),
//! and a network namespace has room for about two thousand of them (`net.core.optmem_max`). The
//! address is added without duplicate address detection and without a prefix route. Its local route
//! is deleted again, because the route would keep this host from forwarding or sending to the
//! address. The address gets no lifetime: the kernel deletes an expired address without leaving the
//! multicast group. For the same reason an interface that is set down by hand loses its addresses
//! but stays joined until the namespace is deleted.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr};

use linux::interface;
use linux::netlink::{Netlink, Refusal, RequestError};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

/// Attempts to delete the local route of an address.
const ROUTE_ATTEMPTS: u32 = 400;

/// Value of `IFA_PROTO` (kernel 5.18) on the addresses that this program adds; `ip address` shows
/// it as is (ASCII `R`).
pub const PROTOCOL: u8 = b'R';

const RT_TABLE_LOCAL: u8 = 255;

/// Why a join cannot be held.
#[derive(Debug, thiserror::Error)]
pub enum StaticJoinError {
    /// The netlink socket failed.
    #[error("Cannot ask the kernel for its multicast joins: {0}; netlink must be permitted")]
    Netlink(#[source] io::Error),
    /// The kernel refused the address or its deletion.
    #[error("The kernel does not hold a join of {address} on interface {ifindex}: {refusal}")]
    Refused {
        /// Multicast address of the join.
        address: Ipv6Addr,
        /// Index of the interface to join on.
        ifindex: u32,
        /// Error of the kernel for the request.
        refusal: Refusal,
    },
}

/// The joins that the kernel holds on one interface for this program. Dropping the value keeps
/// them.
pub struct StaticJoins {
    netlink: Netlink,
    ifindex: u32,
    /// Addresses whose local route remains to be deleted, with the attempts left.
    routed: BTreeMap<Ipv6Addr, u32>,
}

impl StaticJoins {
    /// Opens netlink in the network namespace of the calling thread, for the joins on one
    /// interface.
    ///
    /// # Errors
    ///
    /// [`StaticJoinError::Netlink`].
    pub fn open(ifindex: u32) -> Result<Self, StaticJoinError> {
        let netlink = Netlink::open().map_err(StaticJoinError::Netlink)?;
        Ok(Self {
            netlink,
            ifindex,
            routed: BTreeMap::new(),
        })
    }

    /// Returns the addresses joined, including those of an earlier process, excluding those that
    /// another program has added.
    ///
    /// # Errors
    ///
    /// [`StaticJoinError::Netlink`].
    pub fn list(&mut self) -> Result<Vec<Ipv6Addr>, StaticJoinError> {
        let addresses = (self.netlink.ipv6_addresses()).map_err(StaticJoinError::Netlink)?;
        Ok(addresses
            .iter()
            .filter_map(|message| own(self.ifindex, message))
            .collect())
    }

    /// Joins an address from any source; does nothing if the join exists.
    ///
    /// # Errors
    ///
    /// [`StaticJoinError`], for instance because the kernel has no option memory left.
    pub fn add(&mut self, address: Ipv6Addr) -> Result<(), StaticJoinError> {
        let mut message = self.message(address);
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute | AddressFlags::Mcautojoin;
        message.attributes.extend([
            AddressAttribute::Flags(flags),
            AddressAttribute::Protocol(PROTOCOL.into()),
        ]);
        let request = RouteNetlinkMessage::NewAddress(message);
        match self.change(request, NLM_F_CREATE | NLM_F_EXCL)? {
            Ok(()) => {}
            Err(refusal) if refusal.is_one_of(&[libc::EEXIST]) => return Ok(()),
            Err(refusal) => {
                return Err(StaticJoinError::Refused {
                    address,
                    ifindex: self.ifindex,
                    refusal,
                });
            }
        }
        self.routed.insert(address, ROUTE_ATTEMPTS);
        Ok(())
    }

    /// Whether [`Self::settle`] has local routes left to delete.
    pub fn is_unsettled(&self) -> bool {
        !self.routed.is_empty()
    }

    /// Deletes the local routes of added addresses. The kernel creates each route a moment after
    /// its address; the caller therefore repeats the call every few milliseconds while
    /// [`Self::is_unsettled`].
    ///
    /// # Errors
    ///
    /// [`StaticJoinError::Netlink`].
    pub fn settle(&mut self) -> Result<(), StaticJoinError> {
        for (address, attempts) in std::mem::take(&mut self.routed) {
            if self.delete_route(address)?.is_err() && attempts > 1 {
                self.routed.insert(address, attempts - 1);
            }
        }
        Ok(())
    }

    /// Leaves an address; returns false if this interface had no such join.
    ///
    /// # Errors
    ///
    /// [`StaticJoinError`].
    pub fn remove(&mut self, address: Ipv6Addr) -> Result<bool, StaticJoinError> {
        self.routed.remove(&address);
        let request = RouteNetlinkMessage::DelAddress(self.message(address));
        match self.change(request, 0)? {
            Ok(()) => Ok(true),
            Err(refusal) if is_absent(&refusal) => Ok(false),
            Err(refusal) => Err(StaticJoinError::Refused {
                address,
                ifindex: self.ifindex,
                refusal,
            }),
        }
    }

    fn message(&self, address: Ipv6Addr) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet6;
        message.header.prefix_len = 128;
        message.header.index = self.ifindex;
        let address = IpAddr::V6(address);
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
        ];
        message
    }

    fn delete_route(&mut self, address: Ipv6Addr) -> Result<Result<(), Refusal>, StaticJoinError> {
        let mut route = RouteMessage::default();
        route.header.address_family = AddressFamily::Inet6;
        route.header.destination_prefix_length = 128;
        route.header.table = RT_TABLE_LOCAL;
        route.header.kind = RouteType::Local;
        route.attributes = vec![
            RouteAttribute::Destination(RouteAddress::Inet6(address)),
            RouteAttribute::Oif(self.ifindex),
        ];
        self.change(RouteNetlinkMessage::DelRoute(route), 0)
    }

    fn change(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Result<(), Refusal>, StaticJoinError> {
        match self.netlink.change(request, flags) {
            Ok(()) => Ok(Ok(())),
            Err(RequestError::Socket(error)) => Err(StaticJoinError::Netlink(error)),
            Err(error) => Ok(Err(error.into())),
        }
    }
}

fn is_absent(refusal: &Refusal) -> bool {
    refusal.is_one_of(&[libc::EADDRNOTAVAIL, libc::ENODEV])
}

/// The address of a message, if it is a multicast address that this program added to the interface.
fn own(ifindex: u32, message: &AddressMessage) -> Option<Ipv6Addr> {
    let is_own = message.header.index == ifindex
        && message.attributes.iter().any(|attribute| {
            matches!(attribute, AddressAttribute::Protocol(by) if u8::from(*by) == PROTOCOL)
        });
    is_own
        .then(|| interface::ipv6_address(message))?
        .filter(Ipv6Addr::is_multicast)
}
