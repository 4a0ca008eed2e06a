//! Memberships of the host on the bridge, on behalf of VMs that have not arrived yet.
//!
//! Kernel sockets hold the memberships, so the kernel speaks MLD: it sends State-Change Reports
//! (RFC 9777 §6.1), answers Queries (§6.2), and follows the querier's version (§8). A membership is
//! replaced in one step (RFC 3678 §5.2), without a leave in between.
//!
//! Two kernel limits apply to each socket: the option memory (`net.core.optmem_max`) and the length
//! of a source list (`net.ipv6.mld_max_msf`). Memberships are therefore spread over several
//! sockets. A long INCLUDE list is spread too; the kernel merges its parts (RFC 9777 §4.2). A long
//! EXCLUDE list cannot be split and becomes EXCLUDE {}: the host receives more than requested,
//! never less.
//!
//! Each call takes the kernel's RTNL lock; it returns within microseconds if the lock is free.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv6Addr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use common::maps::{FilterMode, ManagedKey};
use linux::multicast;
use socket2::{Domain, Socket, Type};

use crate::proto::Membership;

/// Most memberships of one socket: the kernel searches them linearly, and they fit the option
/// memory of older kernels (20 KiB).
const MEMBERSHIPS_PER_SOCKET: usize = 128;
/// Kernel default of `net.ipv6.mld_max_msf`, used if the sysctl cannot be read.
const DEFAULT_MAX_SOURCES: usize = 64;

/// Why the host cannot hold a membership.
#[derive(Debug, thiserror::Error)]
pub enum MembershipError {
    /// `socket(2)` failed.
    #[error("Cannot open a socket for multicast memberships: {0}; raise the open files limit")]
    Socket(#[source] io::Error),
    /// A kernel limit is reached (`ENOBUFS`, `ENOMEM`).
    #[error(
        "Cannot join {address} on interface {ifindex}: the kernel's limit is reached ({error}); \
         raise net.core.optmem_max"
    )]
    Limit {
        /// Multicast address of the membership.
        address: Ipv6Addr,
        /// Index of the bridge, or of its VLAN interface.
        ifindex: u32,
        /// Error of `setsockopt(2)`.
        #[source]
        error: io::Error,
    },
    /// `setsockopt(2)` failed for any other reason.
    #[error("Cannot join {address} on interface {ifindex}: {error}; see that the interface is up")]
    Refused {
        /// Multicast address of the membership.
        address: Ipv6Addr,
        /// Index of the bridge, or of its VLAN interface.
        ifindex: u32,
        /// Error of `setsockopt(2)`.
        #[source]
        error: io::Error,
    },
    /// INCLUDE without sources means no membership.
    #[error("Cannot join {0} with an empty list of sources; leave it instead")]
    NoSources(Ipv6Addr),
    /// The bridge has no interface in a tagged VLAN.
    #[error(
        "Cannot join {address} in VLAN {vlan}: the bridge has no interface in that VLAN; \
         add one and configure it"
    )]
    NoVlanInterface {
        /// Multicast address of the membership.
        address: Ipv6Addr,
        /// VLAN identifier of the membership, not 0.
        vlan: u16,
    },
}

/// The part of a membership that a single socket holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    /// Index into [`Memberships::sockets`].
    socket: usize,
    sources: Vec<Ipv6Addr>,
}

#[derive(Debug)]
struct Held {
    filter_mode: FilterMode,
    /// One part, or several for a long INCLUDE list.
    parts: Vec<Part>,
}

struct Slot {
    socket: UdpSocket,
    memberships: usize,
}

/// All memberships of the host on one bridge. Dropping the value leaves every address.
pub struct Memberships {
    ifindex: u32,
    vlan_interfaces: BTreeMap<u16, u32>,
    max_sources: usize,
    sockets: Vec<Slot>,
    held: BTreeMap<ManagedKey, Held>,
}

impl Memberships {
    /// Creates an empty set for a bridge, in the network namespace of the calling thread.
    pub fn new(ifindex: u32) -> Self {
        let max_sources = std::fs::read_to_string("/proc/sys/net/ipv6/mld_max_msf")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .filter(|&sources| sources > 0)
            .unwrap_or(DEFAULT_MAX_SOURCES);
        Self {
            ifindex,
            vlan_interfaces: BTreeMap::new(),
            max_sources,
            sockets: Vec::new(),
            held: BTreeMap::new(),
        }
    }

    /// Registers the interface (`br0.7`) of the bridge in a tagged VLAN.
    pub fn set_vlan_interface(&mut self, vlan: u16, ifindex: u32) {
        self.vlan_interfaces.insert(vlan, ifindex);
    }

    /// The addresses with a membership.
    pub fn keys(&self) -> impl Iterator<Item = ManagedKey> + '_ {
        self.held.keys().copied()
    }

    /// The sockets that hold the memberships. Sockets are appended and removed at the end of the
    /// list only.
    pub fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(|slot| slot.socket.as_fd())
    }

    /// Joins, or replaces the membership of that address.
    ///
    /// # Errors
    ///
    /// See [`MembershipError`]. The previous membership may then remain in part; the next `join` or
    /// `leave` of the address repairs it.
    pub fn join(&mut self, membership: &Membership) -> Result<(), MembershipError> {
        let key = membership.key;
        let address = Ipv6Addr::from(key.multicast_address);
        let ifindex = self.interface(&key)?;
        let sources: BTreeSet<Ipv6Addr> = membership.sources.iter().copied().collect();
        if membership.filter_mode == FilterMode::Include && sources.is_empty() {
            return Err(MembershipError::NoSources(address));
        }
        let old = self.held.remove(&key);
        let plan = plan(
            old.as_ref(),
            membership.filter_mode,
            sources,
            self.max_sources,
        );
        if membership.filter_mode == FilterMode::Exclude
            && plan.first().is_some_and(|(_, sources)| sources.is_empty())
            && !membership.sources.is_empty()
        {
            tracing::warn!(%address, sources = membership.sources.len(),
                "list of excluded sources is longer than net.ipv6.mld_max_msf, joined without it");
        }
        let old_parts = old.map(|held| held.parts).unwrap_or_default();
        let mut held = Held {
            filter_mode: membership.filter_mode,
            parts: Vec::new(),
        };
        let mut failure = None;
        // New parts first: between the steps the host receives more, never less.
        let (kept, added): (Vec<_>, Vec<_>) =
            plan.into_iter().partition(|(socket, _)| socket.is_some());
        for (socket, sources) in added.into_iter().chain(kept) {
            if failure.is_some() {
                break;
            }
            let result = match socket {
                Some(socket) => self
                    .set(socket, ifindex, address, held.filter_mode, &sources)
                    .map(|()| socket),
                None => {
                    let busy: Vec<usize> = old_parts
                        .iter()
                        .chain(&held.parts)
                        .map(|part| part.socket)
                        .collect();
                    self.add(ifindex, address, held.filter_mode, &sources, &busy)
                }
            };
            match result {
                Ok(socket) => held.parts.push(Part { socket, sources }),
                Err(error) => failure = Some(error),
            }
        }
        for part in old_parts {
            if held.parts.iter().any(|kept| kept.socket == part.socket) {
                continue;
            }
            if failure.is_some() {
                held.parts.push(part);
            } else {
                self.drop_part(part.socket, ifindex, address);
            }
        }
        if !held.parts.is_empty() {
            self.held.insert(key, held);
        }
        failure.map_or(Ok(()), Err)
    }

    /// Leaves an address; does nothing without a membership.
    pub fn leave(&mut self, key: &ManagedKey) {
        let Ok(ifindex) = self.interface(key) else {
            return;
        };
        if let Some(held) = self.held.remove(key) {
            for part in held.parts {
                self.drop_part(part.socket, ifindex, Ipv6Addr::from(key.multicast_address));
            }
        }
    }

    /// Joins and leaves at once. The querier then asks whether anyone is left (RFC 9777 §7.6.3) and
    /// stops the stream if nobody answers. Does nothing for an address with a membership.
    ///
    /// # Errors
    ///
    /// See [`MembershipError`].
    pub fn prune(&mut self, key: &ManagedKey) -> Result<(), MembershipError> {
        if self.held.contains_key(key) {
            return Ok(());
        }
        let ifindex = self.interface(key)?;
        let address = Ipv6Addr::from(key.multicast_address);
        let socket = self.add(ifindex, address, FilterMode::Exclude, &[], &[])?;
        self.drop_part(socket, ifindex, address);
        Ok(())
    }

    fn interface(&self, key: &ManagedKey) -> Result<u32, MembershipError> {
        if key.vlan == 0 {
            return Ok(self.ifindex);
        }
        self.vlan_interfaces
            .get(&key.vlan)
            .copied()
            .ok_or(MembershipError::NoVlanInterface {
                address: Ipv6Addr::from(key.multicast_address),
                vlan: key.vlan,
            })
    }

    /// Joins on a socket that has room and is not in `busy`; returns the index of the socket.
    fn add(
        &mut self,
        ifindex: u32,
        address: Ipv6Addr,
        filter_mode: FilterMode,
        sources: &[Ipv6Addr],
        busy: &[usize],
    ) -> Result<usize, MembershipError> {
        let candidates: Vec<usize> = (0..self.sockets.len())
            .filter(|index| !busy.contains(index))
            .filter(|&index| {
                self.sockets
                    .get(index)
                    .is_some_and(|slot| slot.memberships < MEMBERSHIPS_PER_SOCKET)
            })
            .collect();
        for index in candidates {
            match self.join_on(index, ifindex, address, filter_mode, sources) {
                Err(MembershipError::Limit { .. }) => {}
                other => return other.map(|()| index),
            }
        }
        let socket =
            Socket::new(Domain::IPV6, Type::DGRAM, None).map_err(MembershipError::Socket)?;
        self.sockets.push(Slot {
            socket: socket.into(),
            memberships: 0,
        });
        let index = self.sockets.len() - 1;
        self.join_on(index, ifindex, address, filter_mode, sources)
            .map(|()| index)
    }

    fn join_on(
        &mut self,
        index: usize,
        ifindex: u32,
        address: Ipv6Addr,
        filter_mode: FilterMode,
        sources: &[Ipv6Addr],
    ) -> Result<(), MembershipError> {
        let Some(slot) = self.sockets.get_mut(index) else {
            return Ok(());
        };
        let joined = match (filter_mode, sources.first()) {
            // The kernel accepts a filter only for a joined address. A join of the first source
            // keeps an address of source-specific multicast out of EXCLUDE mode (RFC 4604 §2.2).
            (FilterMode::Include, Some(source)) => {
                multicast::join_source(&slot.socket, ifindex, address, *source)
            }
            _ => slot.socket.join_multicast_v6(&address, ifindex),
        };
        joined.map_err(|error| refusal(address, ifindex, error))?;
        slot.memberships += 1;
        let single = filter_mode == FilterMode::Include && sources.len() == 1;
        if sources.is_empty() || single {
            return Ok(());
        }
        let result = self.set(index, ifindex, address, filter_mode, sources);
        if result.is_err() {
            self.drop_part(index, ifindex, address);
        }
        result
    }

    fn set(
        &self,
        index: usize,
        ifindex: u32,
        address: Ipv6Addr,
        filter_mode: FilterMode,
        sources: &[Ipv6Addr],
    ) -> Result<(), MembershipError> {
        let Some(slot) = self.sockets.get(index) else {
            return Ok(());
        };
        multicast::set_filter(&slot.socket, ifindex, address, filter_mode, sources)
            .map_err(|error| refusal(address, ifindex, error))
    }

    fn drop_part(&mut self, index: usize, ifindex: u32, address: Ipv6Addr) {
        if let Some(slot) = self.sockets.get_mut(index) {
            slot.memberships = slot.memberships.saturating_sub(1);
            // Fails only if the interface, and its memberships, no longer exist.
            if let Err(error) = slot.socket.leave_multicast_v6(&address, ifindex) {
                tracing::debug!(%address, ifindex, %error, "membership was gone already");
            }
        }
        // Closes idle sockets at the end only, so that the indices of the others stay valid.
        while self
            .sockets
            .last()
            .is_some_and(|slot| slot.memberships == 0)
        {
            self.sockets.pop();
        }
    }
}

fn refusal(address: Ipv6Addr, ifindex: u32, error: io::Error) -> MembershipError {
    match error.raw_os_error() {
        Some(libc::ENOBUFS | libc::ENOMEM) => MembershipError::Limit {
            address,
            ifindex,
            error,
        },
        _ => MembershipError::Refused {
            address,
            ifindex,
            error,
        },
    }
}

/// Splits a source list over sockets: each part has at most `max_sources` sources and the index of
/// the socket whose old part it replaces, or `None` for another socket. A source stays on its
/// socket.
fn plan(
    old: Option<&Held>,
    filter_mode: FilterMode,
    mut sources: BTreeSet<Ipv6Addr>,
    max_sources: usize,
) -> Vec<(Option<usize>, Vec<Ipv6Addr>)> {
    if filter_mode == FilterMode::Exclude {
        if sources.len() > max_sources {
            sources.clear();
        }
        let socket = old
            .and_then(|held| held.parts.first())
            .map(|part| part.socket);
        return vec![(socket, sources.into_iter().collect())];
    }
    let mut parts: Vec<(Option<usize>, Vec<Ipv6Addr>)> = Vec::new();
    for part in old.map(|held| held.parts.as_slice()).unwrap_or_default() {
        let include = old.is_some_and(|held| held.filter_mode == FilterMode::Include);
        let kept = part
            .sources
            .iter()
            .filter(|source| include && sources.remove(source))
            .copied()
            .collect();
        parts.push((Some(part.socket), kept));
    }
    let mut rest = sources.into_iter().peekable();
    for (_, kept) in &mut parts {
        while kept.len() < max_sources
            && let Some(source) = rest.next()
        {
            kept.push(source);
        }
    }
    parts.retain(|(_, kept)| !kept.is_empty());
    while rest.peek().is_some() {
        parts.push((None, rest.by_ref().take(max_sources.max(1)).collect()));
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addresses(numbers: impl IntoIterator<Item = u16>) -> BTreeSet<Ipv6Addr> {
        numbers
            .into_iter()
            .map(|n| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n))
            .collect()
    }

    #[test]
    fn a_long_exclude_list_becomes_any_source() {
        let plan = plan(None, FilterMode::Exclude, addresses(0..65), 64);
        assert_eq!(plan, vec![(None, Vec::new())]);
    }

    #[test]
    fn a_long_include_list_is_split() {
        let plan = plan(None, FilterMode::Include, addresses(0..130), 64);
        let lengths: Vec<usize> = plan.iter().map(|(_, sources)| sources.len()).collect();
        assert_eq!(lengths, [64, 64, 2]);
    }

    proptest! {
        #[test]
        fn every_source_is_planned_once_and_stays_where_it_was(
            before in prop::collection::btree_set(0u16..40, 1..20),
            after in prop::collection::btree_set(0u16..40, 1..20),
            max_sources in 1usize..8,
        ) {
            let old = Held {
                filter_mode: FilterMode::Include,
                parts: plan(None, FilterMode::Include, addresses(before), max_sources)
                    .into_iter()
                    .enumerate()
                    .map(|(socket, (_, sources))| Part { socket, sources })
                    .collect(),
            };
            let wanted = addresses(after);
            let new = plan(Some(&old), FilterMode::Include, wanted.clone(), max_sources);
            let planned: Vec<Ipv6Addr> = new.iter().flat_map(|(_, sources)| sources.clone()).collect();
            prop_assert_eq!(planned.len(), wanted.len());
            prop_assert_eq!(planned.iter().copied().collect::<BTreeSet<_>>(), wanted);
            for (socket, sources) in &new {
                prop_assert!(!sources.is_empty() && sources.len() <= max_sources);
                for part in &old.parts {
                    for source in &part.sources {
                        if sources.contains(source) {
                            prop_assert_eq!(*socket, Some(part.socket));
                        }
                    }
                }
            }
        }
    }
}
