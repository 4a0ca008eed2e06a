//! What an MLD message from a VM does to the listener tables.
//!
//! One VM stands behind each port, so nothing is merged and nobody is suppressed: a record is
//! applied directly, without the router's timers of RFC 9777 §7. State goes with a leave, and by
//! age when the agent removes it.
//!
//! | record | no listener | INCLUDE (A) | EXCLUDE (A) |
//! |---|---|---|---|
//! | IS_IN(S), TO_IN(S) | INCLUDE (S) | INCLUDE (A+S) | INCLUDE (S), new generation |
//! | IS_IN({}), TO_IN({}), v1 Done | - | leaves | leaves |
//! | IS_EX(S), TO_EX(S), v1 Report | EXCLUDE (S) | EXCLUDE (S), new generation | the same |
//! | ALLOW(S) | INCLUDE (S) | INCLUDE (A+S) | EXCLUDE (A-S) |
//! | BLOCK(S) | - | INCLUDE (A-S), leaves when empty | EXCLUDE (A+S) |
//!
//! IS_IN adds instead of replacing because a list may be split over Reports (RFC 9777 §5.2.15);
//! sources that are no longer listed age out. A list is replaced by giving the listener another
//! generation: entries of `LISTENER_SOURCES` with an older one, or without a listener, are stale
//! and the agent collects them.
//!
//! The agent may apply a frame that the kernel has applied. A record that a later Report has
//! overtaken is skipped.
//!
//! Left out: scopes up to link-local, whose addresses mean nothing on another link, and
//! EXCLUDE for source-specific addresses (RFC 4604 §2.2.1).

use crate::counter::Counter;
use crate::event::Change;
use crate::maps::{Listener, ListenerKey, Source, SourceKey};
use crate::packet::PacketRead;
use crate::wire::checksum;
use crate::wire::mld::{self, Message, NoMessage, RECORD_BYTES, RecordType};

mod walk;

pub use walk::{Report, Step, Walk};

/// Most records that the kernel program reads in one Report.
pub const KERNEL_RECORDS: usize = 96;
/// Most records and sources together that the kernel program applies in one Report.
pub const KERNEL_STEPS: usize = 192;
/// Longest message that the kernel program reads, bytes: that of a link of 1500 bytes, and more.
pub const KERNEL_BYTES: usize = checksum::MAX_BYTES;
/// Most hop-by-hop options that the kernel program reads.
pub const KERNEL_OPTIONS: usize = 8;

/// Most records that fit in [`mld::MAX_BYTES`].
const RECORDS: usize = mld::MAX_BYTES / RECORD_BYTES;
/// Most one-byte options that fit in the longest Hop-by-Hop header.
const OPTIONS: usize = 2048;

/// A limit or a full map stands against a new entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused(
    /// Which.
    pub Counter,
);

/// The tables, and where changes of them are told.
pub trait ListenerStore {
    /// Looks up a listener and copies it to `value`; false if there is none.
    ///
    /// Verifier: a returned `Option` would need its own room on the small stack.
    fn listener(&self, key: &ListenerKey, value: &mut Listener) -> bool;

    /// Adds a listener that is not there.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the port may have no more, or the table is full.
    fn add_listener(&mut self, key: &ListenerKey, value: &Listener) -> Result<(), Refused>;

    /// Overwrites a listener; does nothing if it is gone.
    fn update_listener(&mut self, key: &ListenerKey, value: &Listener);

    /// Removes a listener.
    fn remove_listener(&mut self, key: &ListenerKey);

    /// Looks up a source.
    fn source(&self, key: &SourceKey) -> Option<Source>;

    /// Adds a source that is not there.
    ///
    /// # Errors
    ///
    /// [`Refused`] when the port may have no more, or the table is full.
    fn add_source(&mut self, key: &SourceKey, value: &Source) -> Result<(), Refused>;

    /// Overwrites a source; does nothing if it is gone.
    fn update_source(&mut self, key: &SourceKey, value: &Source);

    /// Removes a source.
    fn remove_source(&mut self, key: &SourceKey);

    /// Tells that a listener changed, left or answered a Query. Comes after the
    /// [`ListenerStore::source_changed`] calls of the same record.
    fn listener_changed(&mut self, change: Change, key: &ListenerKey, value: &Listener);

    /// Tells that a source was listed or taken off.
    fn source_changed(&mut self, change: Change, key: &SourceKey, value: &Source);

    /// Counts something.
    fn count(&mut self, counter: Counter);
}

/// A frame that was taken from a TAP, with what its metadata said.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// The frame from its Ethernet header on.
    pub bytes: &'a [u8],
    /// VLAN identifier taken from the metadata, 0 for none.
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

/// Applies a whole frame, however many records and options it has: what the agent does with a
/// [`crate::event::UnfinishedEvent`]. `at_ns` is when the frame came in by the port `ifindex`.
///
/// Returns whether nothing was refused.
pub fn apply_frame<P, S>(packet: &P, ifindex: u32, at_ns: u64, store: &mut S) -> bool
where
    P: PacketRead + ?Sized,
    S: ListenerStore,
{
    let Some(frame) = mld::ipv6_frame(packet) else {
        return true;
    };
    if mld::is_hidden(packet, &frame) {
        store.count(Counter::MalformedOptions);
        return true;
    }
    let message = match mld::parse::<P, OPTIONS, { mld::MAX_BYTES }>(packet, &frame) {
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
        guest_mac: frame.mac,
        by_agent: true,
    };
    let mut walk = Walk::new();
    if let Err(reason) = begin::<P, S, RECORDS>(packet, &message, &report, &mut walk, store) {
        count_no_message(reason, store);
        return true;
    }
    while walk.step(packet, store) == Step::More {}
    !walk.refused()
}

/// Counts a valid message and prepares a walk that applies it; returns the most steps it takes.
///
/// # Errors
///
/// See [`mld::check_records`].
#[inline(always)]
pub fn begin<P, S, const MAX_RECORDS: usize>(
    packet: &P,
    message: &Message,
    report: &Report,
    walk: &mut Walk,
    store: &mut S,
) -> Result<usize, NoMessage>
where
    P: PacketRead + ?Sized,
    S: ListenerStore,
{
    match message {
        Message::Query(_) => {
            walk.start(report);
            store.count(Counter::GuestQueries);
            Ok(0)
        }
        Message::ReportV1(address) => {
            walk.start_v1(report, RecordType::ModeIsExclude, address);
            store.count(Counter::ReportsV1);
            Ok(1)
        }
        Message::Done(address) => {
            walk.start_v1(report, RecordType::ChangeToIncludeMode, address);
            store.count(Counter::Dones);
            Ok(1)
        }
        Message::ReportV2(records) => {
            let steps = mld::check_records::<P, MAX_RECORDS>(packet, records)?;
            walk.start_v2(report, records);
            store.count(Counter::ReportsV2);
            Ok(steps)
        }
    }
}

/// Counts why a frame gave no message.
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
