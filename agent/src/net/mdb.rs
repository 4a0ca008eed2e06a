//! The bridge's multicast database: what a TAP receives before its VM sends its first Report.
//!
//! The agent adds *temporary* entries (`MDB_TEMPORARY`): they age like entries learnt from a
//! Report, and the VM's own Reports renew or change them. Source lists need `mcast_mld_version 2`
//! on the bridge and kernel 6.3. Without these, and for lists longer than the bridge accepts, the
//! entry is for any source: the TAP receives more than requested, never less.
//!
//! Kernels before 6.3 do not replace an entry either (`EEXIST`). On these kernels the agent deletes
//! and adds again an entry that would expire before its next renewal; a packet in between may miss
//! the entry. Other entries stay untouched.
//!
//! # Wire format
//!
//! `RTM_NEWMDB` and `RTM_DELMDB` are built here because netlink-packet-route has no types for them:
//!
//! ```text
//! struct br_port_msg     { u8 family = AF_BRIDGE, pad[3], u32 ifindex of the bridge }
//! MDBA_SET_ENTRY (1)     struct br_mdb_entry { u32 ifindex of the port, u8 state, u8 flags,
//!                          u16 vid, u8 address[16], u16 protocol (network order), pad[2] }
//! MDBA_SET_ENTRY_ATTRS (2), nested
//!   MDBE_ATTR_SOURCE (1)           16 bytes, of an entry that is removed
//!   MDBE_ATTR_SRC_LIST (2), nested
//!     MDBE_SRC_LIST_ENTRY (1), nested, one for each source
//!       MDBE_SRCATTR_ADDRESS (1)   16 bytes
//!   MDBE_ATTR_GROUP_MODE (3)       u8: 0 EXCLUDE, 1 INCLUDE
//! ```

mod present;

use std::collections::HashMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{BridgeNumber, FilterMode, ManagedKey};
use linux::netlink::bytes::RequestBytes;
use linux::netlink::{Netlink, Refusal};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST};

use super::links::{self, LinksError};
use super::snooping::{self, Snooping};
use crate::proto::{MDB_RENEWAL_LAST, MdbEntry, Membership};

const RTM_NEWMDB: u16 = 84;
const RTM_DELMDB: u16 = 85;

const MDBA_SET_ENTRY: u16 = 1;
const MDBA_SET_ENTRY_ATTRS: u16 = 2;
const MDBE_ATTR_SOURCE: u16 = 1;
const MDBE_ATTR_SRC_LIST: u16 = 2;
const MDBE_ATTR_GROUP_MODE: u16 = 3;
const MDBE_SRC_LIST_ENTRY: u16 = 1;
const MDBE_SRCATTR_ADDRESS: u16 = 1;
const MDB_TEMPORARY: u8 = 0;
const ETH_P_IPV6: u16 = 0x86dd;

/// Margin for a late renewal.
const SPARE: Duration = Duration::from_secs(10);
/// Most sources in one entry (`PG_SRC_ENT_LIMIT` of the kernel's bridge).
const MAX_SOURCES: usize = 32;

/// Why the multicast database cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MdbError {
    /// The bridge does not exist, or is no bridge.
    #[error(transparent)]
    Links(#[from] LinksError),
    /// The netlink socket failed.
    #[error("Cannot reach the bridge by netlink: {0}; run the agent as root")]
    Netlink(#[from] std::io::Error),
    /// The bridge does not snoop: it has no database and floods all multicast.
    #[error("{}", snooping::no_snooping(.0))]
    NoSnooping(String),
    /// The kernel refused an entry.
    #[error(
        "The bridge refused the entry of {address} on port {ifindex}: {refusal}; \
         see that the port is up, and mcast_hash_max of the bridge"
    )]
    Refused {
        /// Index of the port (TAP).
        ifindex: u32,
        /// Multicast address of the entry.
        address: Ipv6Addr,
        /// Error of the kernel for the entry.
        #[source]
        refusal: Refusal,
    },
}

/// The multicast database of one bridge.
pub struct Mdb {
    name: String,
    ifindex: u32,
    number: BridgeNumber,
    snooping: Snooping,
    netlink: Netlink,
    source_lists: bool,
}

impl Mdb {
    /// Opens the database of the bridge with this name and number, in the network namespace of the
    /// calling thread.
    ///
    /// # Errors
    ///
    /// [`MdbError::Links`] when there is no such bridge, [`MdbError::Netlink`].
    pub fn open(bridge: &str, number: BridgeNumber) -> Result<Self, MdbError> {
        let found = links::bridge(bridge)?;
        let snooping = Snooping::of(&found);
        Ok(Self {
            name: bridge.to_owned(),
            ifindex: found.ifindex,
            number,
            snooping,
            netlink: Netlink::open()?,
            source_lists: snooping.mld_version >= 2,
        })
    }

    /// The bridge's settings at the time of [`Self::open`].
    pub fn snooping(&self) -> Snooping {
        self.snooping
    }

    /// Adds or replaces an entry for each (port, membership). Batched: the kernel answers each
    /// request within the system call.
    ///
    /// # Errors
    ///
    /// The whole call fails with [`MdbError::NoSnooping`] or [`MdbError::Netlink`]; otherwise the
    /// result has one outcome per entry, in order.
    pub fn add(
        &mut self,
        entries: &[(u32, &Membership)],
    ) -> Result<Vec<Result<(), MdbError>>, MdbError> {
        let mut outcomes = self.write(entries, self.source_lists)?;
        let unlisted = self.source_lists.then(|| which(&outcomes, is_unsupported));
        // Kernels before 6.3 reject source lists: retry these entries without lists.
        if let Some(unlisted) = unlisted.filter(|it| !it.is_empty()) {
            let plain = self.write(&chosen(entries, &unlisted), false)?;
            if plain.iter().any(Result::is_ok) {
                tracing::warn!(bridge = self.name, "bridge takes no source lists");
            }
            exchange(&mut outcomes, unlisted, plain);
        }
        let present = which(&outcomes, is_present);
        if !present.is_empty() {
            let renewed = self.renew(&chosen(entries, &present))?;
            exchange(&mut outcomes, present, renewed);
        }
        Ok(outcomes)
    }

    /// Deletes and adds again the entries that the kernel did not replace and that expire before
    /// the next renewal. Entries that a VM has reported with sources stay.
    fn renew(
        &mut self,
        entries: &[(u32, &Membership)],
    ) -> Result<Vec<Result<(), MdbError>>, MdbError> {
        let mut left = HashMap::new();
        let (bridge, number) = (self.ifindex, self.number);
        self.netlink.dump_messages(present::dump(), |message| {
            present::read(message, bridge, number, &mut left);
        })?;
        let is_ending = |(ifindex, membership): &(u32, &Membership)| {
            let left = left.get(&(*ifindex, membership.key));
            left.is_some_and(|left| *left < MDB_RENEWAL_LAST + SPARE)
        };
        let ending: Vec<usize> = (0..)
            .zip(entries)
            .filter_map(|(index, entry)| is_ending(entry).then_some(index))
            .collect();
        let mut requests: Vec<Vec<u8>> = Vec::new();
        for (ifindex, membership) in chosen(entries, &ending) {
            let entry = MdbEntry::of_all_sources(ifindex, membership.key);
            requests.push(self.deletion(&entry));
            requests.push(self.addition(ifindex, membership, false));
        }
        let mut outcomes: Vec<_> = entries.iter().map(|_| Ok(())).collect();
        // Outcomes alternate (delete, add). A failed delete means only that the entry had expired.
        let made = self.netlink.apply(&mut requests)?.into_iter();
        let made: Vec<_> = made.skip(1).step_by(2).collect();
        let keys: Vec<_> = keys(&chosen(entries, &ending)).collect();
        exchange(&mut outcomes, ending, refusals(made, keys, &[]));
        Ok(outcomes)
    }

    /// Deletes entries. A missing entry counts as deleted.
    ///
    /// # Errors
    ///
    /// As [`Mdb::add`].
    pub fn delete(&mut self, entries: &[MdbEntry]) -> Result<Vec<Result<(), MdbError>>, MdbError> {
        let requests = entries.iter().map(|entry| self.deletion(entry)).collect();
        let keys = entries.iter().map(|entry| (entry.ifindex, entry.key));
        self.apply(requests, keys, &[libc::ENOENT, libc::EINVAL, libc::ENODEV])
    }

    fn write(
        &mut self,
        entries: &[(u32, &Membership)],
        source_lists: bool,
    ) -> Result<Vec<Result<(), MdbError>>, MdbError> {
        let requests = entries
            .iter()
            .map(|(ifindex, membership)| self.addition(*ifindex, membership, source_lists))
            .collect();
        self.apply(requests, keys(entries), &[])
    }

    fn deletion(&self, of: &MdbEntry) -> Vec<u8> {
        let mut request = self.start(RTM_DELMDB, 0);
        request.attribute(MDBA_SET_ENTRY, &entry(of.ifindex, &of.key));
        if let Some(source) = &of.source {
            request.nest(MDBA_SET_ENTRY_ATTRS, |request| {
                request.attribute(MDBE_ATTR_SOURCE, source);
            });
        }
        request.finish()
    }

    fn addition(&self, ifindex: u32, membership: &Membership, source_lists: bool) -> Vec<u8> {
        let mut request = self.start(RTM_NEWMDB, NLM_F_CREATE | NLM_F_REPLACE);
        request.attribute(MDBA_SET_ENTRY, &entry(ifindex, &membership.key));
        if source_lists {
            filter(&mut request, membership);
        }
        request.finish()
    }

    fn start(&self, kind: u16, flags: u16) -> RequestBytes {
        let mut request = RequestBytes::new(kind, NLM_F_REQUEST | NLM_F_ACK | flags);
        request.push(&[libc::AF_BRIDGE as u8]);
        request.push(&self.ifindex.to_ne_bytes());
        request
    }

    fn apply(
        &mut self,
        mut requests: Vec<Vec<u8>>,
        keys: impl IntoIterator<Item = (u32, ManagedKey)>,
        harmless: &[i32],
    ) -> Result<Vec<Result<(), MdbError>>, MdbError> {
        if !self.snooping.enabled {
            self.snooping = Snooping::of(&links::bridge(&self.name)?);
            if !self.snooping.enabled {
                return Err(MdbError::NoSnooping(self.name.clone()));
            }
        }
        let outcomes = self.netlink.apply(&mut requests)?;
        Ok(refusals(outcomes, keys, harmless))
    }
}

fn keys(entries: &[(u32, &Membership)]) -> impl Iterator<Item = (u32, ManagedKey)> {
    entries.iter().map(|(ifindex, m)| (*ifindex, m.key))
}

fn refusals(
    outcomes: Vec<Result<(), Refusal>>,
    keys: impl IntoIterator<Item = (u32, ManagedKey)>,
    harmless: &[i32],
) -> Vec<Result<(), MdbError>> {
    outcomes
        .into_iter()
        .zip(keys)
        .map(|(outcome, (ifindex, key))| match outcome {
            Err(refusal)
                if !refusal
                    .error
                    .raw_os_error()
                    .is_some_and(|code| harmless.contains(&code)) =>
            {
                Err(MdbError::Refused {
                    ifindex,
                    address: Ipv6Addr::from(key.multicast_address),
                    refusal,
                })
            }
            _ => Ok(()),
        })
        .collect()
}

/// Indices of the outcomes for which `is_so` holds.
fn which(
    outcomes: &[Result<(), MdbError>],
    is_so: impl Fn(&Result<(), MdbError>) -> bool,
) -> Vec<usize> {
    (0..)
        .zip(outcomes)
        .filter_map(|(index, outcome)| is_so(outcome).then_some(index))
        .collect()
}

fn chosen<'a>(entries: &[(u32, &'a Membership)], indexes: &[usize]) -> Vec<(u32, &'a Membership)> {
    indexes
        .iter()
        .filter_map(|&index| entries.get(index).copied())
        .collect()
}

/// Replaces the outcomes at these indices by the outcomes of a second attempt.
fn exchange(
    outcomes: &mut [Result<(), MdbError>],
    indexes: Vec<usize>,
    others: Vec<Result<(), MdbError>>,
) {
    for (index, other) in indexes.into_iter().zip(others) {
        if let Some(slot) = outcomes.get_mut(index) {
            *slot = other;
        }
    }
}

fn is_refused_with(outcome: &Result<(), MdbError>, codes: &[i32]) -> bool {
    matches!(outcome, Err(MdbError::Refused { refusal, .. })
        if refusal.error.raw_os_error().is_some_and(|code| codes.contains(&code)))
}

fn is_unsupported(outcome: &Result<(), MdbError>) -> bool {
    is_refused_with(outcome, &[libc::EINVAL, libc::EOPNOTSUPP])
}

fn is_present(outcome: &Result<(), MdbError>) -> bool {
    is_refused_with(outcome, &[libc::EEXIST])
}

/// `struct br_mdb_entry`, 28 bytes.
fn entry(ifindex: u32, key: &ManagedKey) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    bytes.extend_from_slice(&ifindex.to_ne_bytes());
    bytes.extend_from_slice(&[MDB_TEMPORARY, 0]);
    bytes.extend_from_slice(&key.vlan.to_ne_bytes());
    bytes.extend_from_slice(&key.multicast_address);
    bytes.extend_from_slice(&ETH_P_IPV6.to_be_bytes());
    bytes.extend_from_slice(&[0; 2]);
    bytes
}

fn filter(request: &mut RequestBytes, membership: &Membership) {
    // The kernel's default is EXCLUDE {}, any source.
    if membership.sources.is_empty() || membership.sources.len() > MAX_SOURCES {
        return;
    }
    request.nest(MDBA_SET_ENTRY_ATTRS, |request| {
        request.nest(MDBE_ATTR_SRC_LIST, |request| {
            for source in &membership.sources {
                request.nest(MDBE_SRC_LIST_ENTRY, |request| {
                    request.attribute(MDBE_SRCATTR_ADDRESS, &source.octets());
                });
            }
        });
        let mode = match membership.filter_mode {
            FilterMode::Exclude => 0,
            FilterMode::Include => 1,
        };
        request.attribute(MDBE_ATTR_GROUP_MODE, &[mode]);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_layout_of_the_kernel() {
        let key = ManagedKey {
            vlan: 7,
            bridge: BridgeNumber::FIRST,
            multicast_address: [0xff; 16],
        };
        let bytes = entry(3, &key);
        assert_eq!(bytes.len(), 28);
        assert_eq!(bytes.get(..4), Some(&3u32.to_ne_bytes()[..]));
        assert_eq!(bytes.get(6..8), Some(&7u16.to_ne_bytes()[..]));
        assert_eq!(bytes.get(24..26), Some(&[0x86, 0xdd][..]));
    }
}
