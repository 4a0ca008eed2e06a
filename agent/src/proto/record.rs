//! Records of the last migrations: outcome, and duration of each part.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{Phase, Reason, Reception};

use super::copy::CopyWay;
use super::handover::{HoldReport, UnreadReport};
use super::{DomainUuid, Mac, Timestamp};

/// Maximum number of records, including running migrations.
pub const RECORDS: usize = 100;

/// Which end of a migration this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// This host is the source host.
    Outgoing,
    /// This host is the destination host.
    Incoming,
}

/// Outcome of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VM runs at the destination host.
    Completed,
    /// The VM does not run at the destination host.
    Failed(Reason),
}

/// Why no gate held the streams of a NIC until its VM ran at the destination host. Such a NIC may have
/// lost, duplicated or reordered packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ungated {
    /// The configuration disables gates.
    SwitchedOff,
    /// The kernel did not create the gate.
    NotMade,
    /// The gate reached its maximum closed time.
    ClosedTooLong,
    /// The VM ran before its TAP was known.
    RanAlready,
}

/// State of the VM's address at the destination host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimOutcome {
    /// Duplicate address detection is in progress.
    Asked,
    /// Nobody else has the address.
    Unique,
    /// The VM cannot have the address.
    Refused,
    /// Somebody else has the address too; the conflict was detected after the switch.
    Disputed,
    /// The VM sends from the address itself.
    Spoken,
    /// The VM never sent from the address.
    Silent,
    /// The destination host has no means to check the address.
    Unknown,
}

/// Packets forwarded for one address that the VM left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardRecord {
    /// Old address of the VM.
    pub address: Ipv6Addr,
    /// New destination of the packets.
    pub to: Ipv6Addr,
    /// Number of forwarded packets.
    pub packets: u64,
    /// Bytes of the forwarded packets.
    pub bytes: u64,
    /// Packets that could not be forwarded.
    pub dropped: u64,
}

/// Translated packets that the VM sent from one old address through one TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TranslationRecord {
    /// Interface index of the TAP.
    pub ifindex: u32,
    /// Old address of the VM.
    pub address: Ipv6Addr,
    /// Number of translated packets.
    pub packets: u64,
    /// Bytes of the translated packets.
    pub bytes: u64,
    /// Packets that could not be sent.
    pub dropped: u64,
}

/// What the agents did for the unicast addresses of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnicastRecord {
    /// Address of the VM at the destination host.
    pub address: Ipv6Addr,
    /// State of that address.
    pub claim: ClaimOutcome,
    /// Forwarded packets per old address; at the source host only.
    pub forwards: Vec<ForwardRecord>,
    /// Forwarded packets that the VM had not read when the VM stopped; at the source host only.
    pub unread: UnreadReport,
    /// Translated packets per TAP and old address; at the destination host only.
    pub translations: Vec<TranslationRecord>,
}

/// One migration, at one of its ends.
#[derive(Clone, Debug)]
pub struct MigrationRecord {
    /// Number of the record, counted from 1 since the agent's start.
    pub number: u64,
    /// Which end of the migration this host is.
    pub direction: Direction,
    /// UUID of the migrated domain.
    pub domain_uuid: DomainUuid,
    /// libvirt's name for the migrated domain.
    pub domain_name: String,
    /// Name of the agent at the other end.
    pub peer: String,
    /// Current phase, or the phase at the end.
    pub phase: Phase,
    /// Time of the request.
    pub started: Timestamp,
    /// Time of the end; `None` while the migration runs.
    pub ended: Option<Timestamp>,
    /// Time from the request to its answer. The value covers the destination host's joins and probes
    /// and, at the source host, also the messages' transit times.
    pub signalling: Option<Duration>,
    /// Time from START MIGRATION until the VM stopped for the switch; at the source host only.
    pub copy: Option<Duration>,
    /// Path and encryption of the memory copy; at the source host only. `None` if somebody else than
    /// the agent started libvirt's migration.
    pub way: Option<CopyWay>,
    /// Duration of the VM's pause for the switch, as QEMU reports the pause.
    pub vm_pause: Option<Duration>,
    /// Time from the request to the end.
    pub total: Option<Duration>,
    /// Bytes of memory copied.
    pub processed_bytes: u64,
    /// Bytes of guest memory in total.
    pub total_bytes: u64,
    /// Verdicts of the destination host's probes.
    pub receptions: Vec<Reception>,
    /// Handover report of each NIC, by the ifindex of its TAP; at the destination host only.
    pub handover: BTreeMap<u32, HoldReport>,
    /// NICs with streams but without a gate; at the destination host only.
    pub ungated: BTreeMap<Mac, Ungated>,
    /// Upper bound of the frames that the VM lost because the VM resumed at the source host; at the
    /// source host only.
    pub thrown_away_at_most: u64,
    /// Handling of the VM's unicast addresses; `None` if the VM named none.
    pub unicast: Option<UnicastRecord>,
    /// Outcome; `None` while the migration runs.
    pub outcome: Option<Outcome>,
}

impl MigrationRecord {
    /// Records the state of the VM's address.
    pub(super) fn claim(&mut self, address: Ipv6Addr, claim: ClaimOutcome) {
        match &mut self.unicast {
            Some(unicast) if unicast.address == address => unicast.claim = claim,
            _ => {
                self.unicast = Some(UnicastRecord {
                    address,
                    claim,
                    forwards: Vec::new(),
                    unread: UnreadReport::default(),
                    translations: Vec::new(),
                });
            }
        }
    }

    /// Records the packets forwarded so far for one address.
    pub(super) fn forwarded(&mut self, forward: ForwardRecord) {
        let Some(unicast) = &mut self.unicast else {
            return;
        };
        let known = |it: &&mut ForwardRecord| it.address == forward.address;
        match unicast.forwards.iter_mut().find(known) {
            Some(known) => *known = forward,
            None => unicast.forwards.push(forward),
        }
    }

    /// Adds forwarded packets that the VM had not read.
    pub(super) fn sent_on(&mut self, report: UnreadReport) {
        if let Some(unicast) = &mut self.unicast {
            unicast.unread.packets += report.packets;
            unicast.unread.dropped += report.dropped;
        }
    }

    /// Adds an upper bound of the frames that the hypervisor read from the TAP and discarded before the
    /// VM resumed.
    pub(super) fn thrown_away(&mut self, at_most: u64) {
        self.thrown_away_at_most = self.thrown_away_at_most.saturating_add(at_most);
    }

    /// Records the packets translated so far for one address at one TAP.
    pub(super) fn translated(&mut self, translation: TranslationRecord) {
        let Some(unicast) = &mut self.unicast else {
            return;
        };
        let place = |it: &TranslationRecord| (it.ifindex, it.address);
        let known = |it: &&mut TranslationRecord| place(it) == place(&translation);
        match unicast.translations.iter_mut().find(known) {
            Some(known) => *known = translation,
            None => unicast.translations.push(translation),
        }
    }

    fn translates(&self, ifindex: u32, address: Ipv6Addr) -> bool {
        let known = |it: &TranslationRecord| (it.ifindex, it.address) == (ifindex, address);
        let unicast = self.unicast.as_ref();
        unicast.is_some_and(|it| it.translations.iter().any(known))
    }

    fn forward_of(&self, address: Ipv6Addr) -> Option<ForwardRecord> {
        let forwards = &self.unicast.as_ref()?.forwards;
        forwards.iter().find(|it| it.address == address).copied()
    }
}

/// The last [`RECORDS`] migrations, oldest first.
#[derive(Debug, Default)]
pub(super) struct Records {
    records: VecDeque<MigrationRecord>,
    last: u64,
}

impl Records {
    /// Begins a record and returns its number.
    pub(super) fn begin(
        &mut self,
        now: Timestamp,
        direction: Direction,
        domain_uuid: DomainUuid,
        domain_name: &str,
        peer: &str,
    ) -> u64 {
        self.last += 1;
        if self.records.len() >= RECORDS {
            // Running migrations stay. The limits on concurrent migrations keep their number below
            // `RECORDS`.
            let oldest = self
                .records
                .iter()
                .position(|record| record.outcome.is_some());
            self.records.remove(oldest.unwrap_or_default());
        }
        self.records.push_back(MigrationRecord {
            number: self.last,
            direction,
            domain_uuid,
            domain_name: domain_name.to_owned(),
            peer: peer.to_owned(),
            phase: Phase::Preparing,
            started: now,
            ended: None,
            signalling: None,
            copy: None,
            way: None,
            vm_pause: None,
            total: None,
            processed_bytes: 0,
            total_bytes: 0,
            receptions: Vec::new(),
            handover: BTreeMap::new(),
            ungated: BTreeMap::new(),
            thrown_away_at_most: 0,
            unicast: None,
            outcome: None,
        });
        self.last
    }

    /// Applies `change` to a record unless the record was evicted.
    pub(super) fn update(&mut self, number: u64, change: impl FnOnce(&mut MigrationRecord)) {
        if let Some(record) = self.records.iter_mut().rev().find(|r| r.number == number) {
            change(record);
        }
    }

    /// Ends a record.
    pub(super) fn end(&mut self, number: u64, now: Timestamp, outcome: Outcome) {
        self.update(number, |record| {
            if outcome == Outcome::Completed {
                record.phase = Phase::Completed;
            }
            record.ended = Some(now);
            record.total = Some(now.since(record.started));
            record.outcome = Some(outcome);
        });
    }

    /// Records the counts of an address in the latest migration that forwards for the address.
    pub(super) fn count_forwarded(&mut self, address: Ipv6Addr, counts: [u64; 3]) {
        let [packets, bytes, dropped] = counts;
        let found = self
            .records
            .iter_mut()
            .rev()
            .find_map(|record| Some((record.forward_of(address)?, record)));
        if let Some((known, record)) = found {
            record.forwarded(ForwardRecord {
                packets,
                bytes,
                dropped,
                ..known
            });
        }
    }

    /// Records the counts of an address at a TAP in the latest migration that translates the address
    /// there.
    pub(super) fn count_translated(&mut self, ifindex: u32, address: Ipv6Addr, counts: [u64; 3]) {
        let [packets, bytes, dropped] = counts;
        let mut records = self.records.iter_mut().rev();
        if let Some(record) = records.find(|it| it.translates(ifindex, address)) {
            record.translated(TranslationRecord {
                ifindex,
                address,
                packets,
                bytes,
                dropped,
            });
        }
    }

    /// Returns a record by its number; `None` if the record was evicted.
    pub(super) fn get(&self, number: u64) -> Option<&MigrationRecord> {
        self.records.iter().rev().find(|r| r.number == number)
    }

    /// Returns all records, oldest first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &MigrationRecord> {
        self.records.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_ended_record_makes_room_and_a_running_one_stays() {
        let mut records = Records::default();
        let mut begin = || {
            records.begin(
                Timestamp(0),
                Direction::Outgoing,
                DomainUuid([0; 16]),
                "viewer",
                "vms2",
            )
        };
        let running = begin();
        let ended: Vec<_> = (1..RECORDS).map(|_| begin()).collect();
        for number in &ended {
            records.end(*number, Timestamp(5), Outcome::Completed);
        }
        records.begin(
            Timestamp(0),
            Direction::Incoming,
            DomainUuid([0; 16]),
            "viewer",
            "vms2",
        );
        assert_eq!(records.iter().count(), RECORDS);
        assert!(records.get(running).is_some());
        assert!(records.get(ended[0]).is_none());
    }
}
