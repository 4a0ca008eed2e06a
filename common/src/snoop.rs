//! Effect of a VM's messages about its memberships on the listener tables.
//!
//! | module | holds |
//! |---|---|
//! | `records` | what a protocol yields: records and their sources |
//! | [`mld`] | the records of MLD (RFC 9777) |
//! | `walk` | the effect of records on the tables |
//!
//! Each port has one VM, so nothing is merged and no listener suppresses another: every record
//! applies directly, without the router timers of RFC 9777 §7. State ends with a leave, or by age
//! when the agent removes it.
//!
//! | record | no listener | INCLUDE (A) | EXCLUDE (A) |
//! |---|---|---|---|
//! | IS_IN(S), TO_IN(S) | INCLUDE (S) | INCLUDE (A+S) | INCLUDE (S), new generation |
//! | IS_IN({}), TO_IN({}), v1 Done | - | leaves | leaves |
//! | IS_EX(S), TO_EX(S), v1 Report | EXCLUDE (S) | EXCLUDE (S), new generation | EXCLUDE (S), new
//! generation |
//! | ALLOW(S) | INCLUDE (S) | INCLUDE (A+S) | EXCLUDE (A-S) |
//! | BLOCK(S) | - | INCLUDE (A-S), leaves when empty | EXCLUDE (A+S) |
//!
//! IS_IN adds instead of replacing, because a list may be split over several Reports (RFC 9777
//! §5.2.15); sources that no Report lists any longer age out. To replace a list, the listener gets
//! another generation: entries of `LISTENER_SOURCES` of an older generation, or without a listener,
//! are stale, and the agent removes them.
//!
//! The agent may apply a frame that the kernel has applied already; both skip a record that a later
//! Report has overtaken.

use crate::counter::Counter;
use crate::event::Change;
use crate::maps::{BridgeNumber, Listener, ListenerKey, Source, SourceKey};
use crate::packet::PacketRead;
use crate::wire::mld::{NoMessage, RECORD_BYTES};
use crate::wire::{self, checksum};

pub mod mld;
mod records;
mod walk;

pub use records::{Ignored, Record, RecordType, Records};
pub use walk::{Report, Step, Walk};

/// Limit of records in one Report that the kernel program reads.
pub const KERNEL_RECORDS: usize = 96;
/// Limit of records plus sources in one Report that the kernel program applies.
pub const KERNEL_STEPS: usize = 192;
/// Longest message that the kernel program reads, bytes; covers a link with an MTU of 1500 bytes.
pub const KERNEL_BYTES: usize = checksum::MAX_BYTES;
/// Limit of Hop-by-Hop options that the kernel program reads.
pub const KERNEL_OPTIONS: usize = 8;

/// Records that fit in [`wire::mld::MAX_BYTES`].
const RECORDS: usize = wire::mld::MAX_BYTES / RECORD_BYTES;
/// One-byte options that fit in the longest Hop-by-Hop Options header.
const OPTIONS: usize = 2048;

/// A limit or a full map refuses a new entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(
    /// Counter of the limit or map.
    pub Counter,
);

/// The listener tables, and the receiver of their changes.
pub trait ListenerStore {
    /// Looks up a listener and copies it to `value`; returns false without an entry.
    ///
    /// Verifier: a returned `Option` would need more room on the small stack.
    fn listener(&self, key: &ListenerKey, value: &mut Listener) -> bool;

    /// Adds a new listener.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the port has reached its limit, or the table is full.
    fn add_listener(&mut self, key: &ListenerKey, value: &Listener) -> Result<(), Refused>;

    /// Overwrites a listener; does nothing without an entry.
    fn update_listener(&mut self, key: &ListenerKey, value: &Listener);

    /// Removes a listener, and keeps its sources.
    fn remove_listener(&mut self, key: &ListenerKey);

    /// Returns a source of a listener's list.
    fn source(&self, key: &SourceKey) -> Option<Source>;

    /// Adds a new source.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the port has reached its limit, or the table is full.
    fn add_source(&mut self, key: &SourceKey, value: &Source) -> Result<(), Refused>;

    /// Overwrites a source; does nothing without an entry.
    fn update_source(&mut self, key: &SourceKey, value: &Source);

    /// Removes a source from the table.
    fn remove_source(&mut self, key: &SourceKey);

    /// Reports that a listener changed, left or answered a Query, after the
    /// [`ListenerStore::source_changed`] calls of the same record.
    fn listener_changed(&mut self, change: Change, key: &ListenerKey, value: &Listener);

    /// Reports that a source joined or left a list.
    fn source_changed(&mut self, change: Change, key: &SourceKey, value: &Source);

    /// Adds one to a counter.
    fn count(&mut self, counter: Counter);
}

/// A frame received from a TAP, with its metadata.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Frame from its Ethernet header on.
    pub bytes: &'a [u8],
    /// VLAN identifier in the metadata, 0 for none.
    pub vlan_metadata: u16,
}

impl PacketRead for Frame<'_> {
    fn len(&self) -> usize {
        self.bytes.len()
    }

    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], crate::packet::Truncated> {
        self.bytes.read(offset)
    }

    fn vlan_metadata(&self) -> u16 {
        self.vlan_metadata
    }
}

/// Applies a whole frame without the limits of the kernel program: the agent's handling of a
/// [`crate::event::UnfinishedEvent`]. The port `ifindex` of a bridge received the
/// frame at `at_ns`.
///
/// Returns false when a limit or a full map refused a part.
pub fn apply_frame<P, S>(
    packet: &P,
    ifindex: u32,
    bridge: BridgeNumber,
    at_ns: u64,
    store: &mut S,
) -> bool
where
    P: PacketRead + ?Sized,
    S: ListenerStore,
{
    let Some(frame) = wire::mld::ipv6_frame(packet) else {
        return true;
    };
    if wire::mld::is_hidden(packet, &frame) {
        store.count(Counter::MalformedOptions);
        return true;
    }
    let message = match wire::mld::parse::<P, OPTIONS, { wire::mld::MAX_BYTES }>(packet, &frame) {
        Ok(message) => message,
        Err(reason) => {
            count_no_message(reason, store);
            return true;
        }
    };
    let report = Report {
        at_ns,
        ifindex,
        vlan: frame.vlan,
        bridge,
        guest_mac: frame.mac,
        by_agent: true,
    };
    let mut walk = Walk::new();
    if let Err(reason) = mld::begin::<P, S, RECORDS>(packet, &message, &report, &mut walk, store) {
        count_no_message(reason, store);
        return true;
    }
    while walk.step(packet, store) == Step::More {}
    !walk.refused()
}

/// Counts why a frame has no valid message.
#[inline(always)]
pub fn count_no_message<S: ListenerStore>(reason: NoMessage, store: &mut S) {
    match reason {
        NoMessage::Other => {}
        NoMessage::Malformed(counter) => store.count(counter),
        NoMessage::Unfinished => store.count(Counter::Unfinished),
    }
}

#[cfg(test)]
mod tests;
