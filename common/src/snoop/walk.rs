//! The walk over the records and sources of one message, in steps of constant cost: one iteration
//! of a kernel program's loop. The walk knows no protocol; [`Records`] reads the packet.

use super::{Ignored, ListenerStore, Record, RecordType, Records};
use crate::counter::Counter;
use crate::event::Change;
use crate::maps::{BridgeNumber, FilterMode, Listener, ListenerKey, NO_BRIDGE, Source, SourceKey};
use crate::packet::PacketRead;
use crate::wire::ipv6;

/// Metadata of a received message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Arrival, `CLOCK_MONOTONIC` nanoseconds.
    pub at_ns: u64,
    /// TAP that received the message.
    pub ifindex: u32,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
    /// Bridge of the TAP.
    pub bridge: BridgeNumber,
    /// Ethernet source of the frame.
    pub guest_mac: [u8; 6],
    /// Whether the agent applies the message, possibly after the kernel program.
    pub by_agent: bool,
}

/// Result of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The walk has more steps.
    More,
    /// The walk has applied all records.
    Done,
}

/// Effect of the current record on its sources.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// The record has no effect.
    Skip,
    /// Adds the sources to the list.
    Add,
    /// Removes the sources from the list.
    Remove,
}

/// State of a walk over the records of one protocol. Each [`Walk::step`] reads one record header or
/// one source, so the kernel program needs one loop with one body for the verifier.
#[derive(Clone, Copy, Debug)]
pub struct Walk<R> {
    at_ns: u64,
    /// Value of the current record's listener, written at the end of the record.
    listener: Listener,
    /// Keys of the current record's listener and of the current source.
    key: SourceKey,
    records: R,
    /// Number of records begun.
    place: u32,
    sources_left: u32,
    guest_mac: [u8; 6],
    operation: Operation,
    /// Protocol version of the current record.
    version: u8,
    /// Whether the current record added the listener.
    added: bool,
    /// Whether the current record changed the filter mode or the list.
    changed: bool,
    /// Whether the current record answers a Query.
    answer: bool,
    by_agent: bool,
    refused: bool,
}

impl<R: Records + Default> Default for Walk<R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<R: Records + Default> Walk<R> {
    /// A walk without records.
    pub fn new() -> Self {
        Self {
            at_ns: 0,
            listener: Listener::NONE,
            key: SourceKey {
                listener: ListenerKey {
                    ifindex: 0,
                    vlan: 0,
                    bridge: NO_BRIDGE,
                    multicast_address: ipv6::UNSPECIFIED,
                },
                source: ipv6::UNSPECIFIED,
            },
            records: R::default(),
            place: 0,
            sources_left: 0,
            guest_mac: [0; 6],
            operation: Operation::Skip,
            version: 0,
            added: false,
            changed: false,
            answer: false,
            by_agent: false,
            refused: false,
        }
    }
}

impl<R: Records> Walk<R> {
    /// Starts a walk over the records of a message.
    #[inline(always)]
    pub fn start(&mut self, report: &Report, records: R) {
        self.at_ns = report.at_ns;
        self.key.listener.ifindex = report.ifindex;
        self.key.listener.vlan = report.vlan;
        self.key.listener.bridge = report.bridge;
        self.guest_mac = report.guest_mac;
        self.by_agent = report.by_agent;
        self.records = records;
        self.place = 0;
        self.sources_left = 0;
        self.refused = false;
    }

    /// Whether a limit or a full map has refused anything.
    #[inline(always)]
    pub fn refused(&self) -> bool {
        self.refused
    }

    /// Applies the next record header or source.
    #[inline(always)]
    pub fn step<P, S>(&mut self, packet: &P, store: &mut S) -> Step
    where
        P: PacketRead + ?Sized,
        S: ListenerStore,
    {
        if self.sources_left > 0 {
            self.sources_left -= 1;
            match self.records.next_source(packet) {
                Some(Ok(source)) => {
                    self.key.source = source;
                    self.apply_source(store);
                }
                Some(Err(Ignored(counter))) => store.count(counter),
                None => return Step::Done,
            }
        } else {
            match self.records.next_record(packet) {
                Some(Ok(record)) => self.begin_record(&record, store),
                Some(Err(Ignored(counter))) => {
                    store.count(counter);
                    return Step::More;
                }
                None => return Step::Done,
            }
        }
        if self.sources_left == 0 {
            self.finish_record(store);
        }
        Step::More
    }

    /// Chooses the operation for the sources of a record.
    #[inline(always)]
    fn begin_record<S: ListenerStore>(&mut self, record: &Record, store: &mut S) {
        self.key.listener.multicast_address = record.multicast_address;
        self.place += 1;
        self.sources_left = record.sources;
        self.version = record.version;
        self.added = false;
        self.changed = false;
        self.operation = self.begin(record.record_type, store);
        if self.operation == Operation::Skip {
            self.sources_left = 0;
        }
    }

    #[inline(always)]
    fn begin<S: ListenerStore>(&mut self, record_type: RecordType, store: &mut S) -> Operation {
        let exclude = record_type.is_exclude();
        self.answer = record_type.is_answer();

        if !store.listener(&self.key.listener, &mut self.listener) {
            let wanted =
                exclude || (self.sources_left > 0 && record_type != RecordType::BlockOldSources);
            if !wanted {
                return Operation::Skip;
            }
            return self.add_listener(exclude, store);
        }
        if self.listener.last_report_ns > self.at_ns {
            store.count(Counter::IgnoredStale);
            return Operation::Skip;
        }
        let including = self.listener.filter_mode == FilterMode::Include as u8;
        match record_type {
            RecordType::ModeIsInclude | RecordType::ChangeToIncludeMode => {
                if !including || self.sources_left == 0 {
                    self.replace_list(FilterMode::Include);
                }
                Operation::Add
            }
            RecordType::ModeIsExclude | RecordType::ChangeToExcludeMode => {
                if including || self.sources_left > 0 || self.listener.source_count > 0 {
                    self.replace_list(FilterMode::Exclude);
                }
                Operation::Add
            }
            RecordType::AllowNewSources if including => Operation::Add,
            RecordType::BlockOldSources if !including => Operation::Add,
            RecordType::AllowNewSources | RecordType::BlockOldSources => Operation::Remove,
        }
    }

    #[inline(always)]
    fn add_listener<S: ListenerStore>(&mut self, exclude: bool, store: &mut S) -> Operation {
        let generation = self.new_generation();
        self.listener = Listener {
            first_report_ns: self.at_ns,
            last_report_ns: self.at_ns,
            last_answer_ns: 0,
            generation,
            source_count: 0,
            filter_mode: if exclude {
                FilterMode::Exclude as u8
            } else {
                FilterMode::Include as u8
            },
            // Readers see the entry before the record ends.
            mld_version: self.version,
            guest_mac: self.guest_mac,
        };
        if let Err(refused) = store.add_listener(&self.key.listener, &self.listener) {
            store.count(refused.0);
            self.refused = true;
            return Operation::Skip;
        }
        self.added = true;
        self.changed = true;
        Operation::Add
    }

    /// A generation that no source of an earlier list has: the time in units of 1,024 ns, the
    /// applying side, and the position of the record in the Report, below 128.
    #[inline(always)]
    fn new_generation(&self) -> u32 {
        let place = self.place & 0x7f;
        ((self.at_ns >> 10) as u32) << 8 | u32::from(self.by_agent) << 7 | place
    }

    #[inline(always)]
    fn replace_list(&mut self, filter_mode: FilterMode) {
        self.listener.filter_mode = filter_mode as u8;
        self.listener.generation = self.new_generation();
        self.listener.source_count = 0;
        self.changed = true;
    }

    #[inline(always)]
    fn apply_source<S: ListenerStore>(&mut self, store: &mut S) {
        let old = store.source(&self.key).map(|old| old.generation);
        let listed = old == Some(self.listener.generation);
        let value = Source {
            last_report_ns: self.at_ns,
            generation: self.listener.generation,
            filter_mode: self.listener.filter_mode,
            // Separate zeros: the compiler would write a repeated constant by a call of `memset`.
            pad: [0, 0, 0],
        };
        if self.operation == Operation::Remove {
            if listed {
                store.remove_source(&self.key);
                self.listener.source_count = self.listener.source_count.saturating_sub(1);
                self.changed = true;
                store.source_changed(Change::Removed, &self.key, &value);
            }
            return;
        }
        if old.is_some() {
            store.update_source(&self.key, &value);
        } else if let Err(refused) = store.add_source(&self.key, &value) {
            store.count(refused.0);
            self.refused = true;
            return;
        }
        if !listed {
            self.listener.source_count = self.listener.source_count.saturating_add(1);
            self.changed = true;
            store.source_changed(Change::Updated, &self.key, &value);
        }
    }

    /// Writes the listener back; removes a listener in INCLUDE mode with an empty list.
    #[inline(always)]
    fn finish_record<S: ListenerStore>(&mut self, store: &mut S) {
        if self.operation == Operation::Skip {
            return;
        }
        self.listener.last_report_ns = self.at_ns;
        self.listener.guest_mac = self.guest_mac;
        self.listener.mld_version = self.version;
        if self.answer {
            self.listener.last_answer_ns = self.at_ns;
        }
        if self.listener.filter_mode == FilterMode::Include as u8 && self.listener.source_count == 0
        {
            store.remove_listener(&self.key.listener);
            if !self.added {
                store.listener_changed(Change::Removed, &self.key.listener, &self.listener);
            }
            return;
        }
        store.update_listener(&self.key.listener, &self.listener);
        if self.changed || self.answer {
            store.listener_changed(Change::Updated, &self.key.listener, &self.listener);
        }
    }
}
