//! What is remembered of each migration: how it went, and how long each part took.

use std::collections::{BTreeMap, VecDeque};
use std::net::Ipv6Addr;
use std::time::Duration;

use common::signal::{Phase, Reason, Reception};

use super::copy::CopyWay;
use super::handover::{HoldReport, UnreadReport};
use super::{DomainUuid, Mac, Timestamp};

/// Migrations remembered, the running ones included.
pub const RECORDS: usize = 100;

/// Which end of a migration this host is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The domain leaves.
    Outgoing,
    /// The domain arrives.
    Incoming,
}

/// How a migration ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The VM runs at the destination.
    Completed,
    /// The VM stays at the source.
    Failed(Reason),
}

/// Why nothing held the streams of a NIC until its VM ran at the destination. Such a NIC may have lost
/// packets, or got them twice or out of order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ungated {
    /// The configuration says so.
    SwitchedOff,
    /// The kernel did not make the gate.
    NotMade,
    /// The gate had been closed for as long as it may be.
    ClosedTooLong,
    /// The VM ran before its TAP was known.
    RanAlready,
}

/// What has become of the address that a VM is to have at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimOutcome {
    /// It is being asked for.
    Asked,
    /// Nobody else has it.
    Unique,
    /// The VM cannot have it.
    Refused,
    /// Somebody else has it too, as was found out after the switch.
    Disputed,
    /// The VM speaks for itself.
    Spoken,
    /// The VM has never spoken from it.
    Silent,
    /// The destination does not know how to find out.
    Unknown,
}

/// What was sent on for one address that the VM has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForwardRecord {
    /// The address.
    pub address: Ipv6Addr,
    /// Where its packets went.
    pub to: Ipv6Addr,
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that could not be sent on.
    pub dropped: u64,
}

/// What was translated of the packets that the VM has sent from one address that it has left, by one
/// TAP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TranslationRecord {
    /// The TAP.
    pub ifindex: u32,
    /// The address.
    pub address: Ipv6Addr,
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Packets that could not be sent.
    pub dropped: u64,
}

/// What was done for the unicast addresses of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnicastRecord {
    /// Its address at the destination.
    pub address: Ipv6Addr,
    /// What has become of it.
    pub claim: ClaimOutcome,
    /// What was sent on; at the source only.
    pub forwards: Vec<ForwardRecord>,
    /// What was sent on of that which it had not read when it stopped; at the source only.
    pub unread: UnreadReport,
    /// What was translated; at the destination only.
    pub translations: Vec<TranslationRecord>,
}

/// One migration, at one of its ends.
#[derive(Clone, Debug)]
pub struct MigrationRecord {
    /// Its number on this agent, from 1 since the agent's start.
    pub number: u64,
    /// Which end this is.
    pub direction: Direction,
    /// UUID of the domain.
    pub domain_uuid: DomainUuid,
    /// Name of the domain.
    pub domain_name: String,
    /// Name of the other end's agent.
    pub peer: String,
    /// Where it stands, or stood when it ended.
    pub phase: Phase,
    /// When it was asked for.
    pub started: Timestamp,
    /// When it ended.
    pub ended: Option<Timestamp>,
    /// From the request until the answer to it: the joins and probes of the destination and, at
    /// the source, their way there and back.
    pub signalling: Option<Duration>,
    /// From START MIGRATION until the VM stopped for the switch; at the source only.
    pub copy: Option<Duration>,
    /// How memory goes; at the source only, and `None` where somebody else than the agent has libvirt move
    /// the domain.
    pub way: Option<CopyWay>,
    /// How long the VM was paused for the switch, as QEMU reports it.
    pub vm_pause: Option<Duration>,
    /// From the request to the end.
    pub total: Option<Duration>,
    /// Bytes of memory copied.
    pub processed_bytes: u64,
    /// Bytes of memory in all.
    pub total_bytes: u64,
    /// Verdicts of the destination's probes.
    pub receptions: Vec<Reception>,
    /// How each NIC's streams were handed over, by the ifindex of its TAP; at the destination only.
    pub handover: BTreeMap<u32, HoldReport>,
    /// NICs with streams that had no gate; at the destination only.
    pub ungated: BTreeMap<Mac, Ungated>,
    /// Frames at most that the VM has lost because it ran on here after it had stopped; at the source only.
    pub thrown_away_at_most: u64,
    /// What was done for the VM's unicast addresses; `None` where it has named none.
    pub unicast: Option<UnicastRecord>,
    /// How it ended; `None` while it runs.
    pub outcome: Option<Outcome>,
}

impl MigrationRecord {
    /// Notes what has become of the VM's address.
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

    /// Notes what was sent on so far.
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

    /// Adds what was sent on of that which the VM had not read.
    pub(super) fn sent_on(&mut self, report: UnreadReport) {
        if let Some(unicast) = &mut self.unicast {
            unicast.unread.packets += report.packets;
            unicast.unread.dropped += report.dropped;
        }
    }

    /// Adds what the hypervisor has read of the TAP and thrown away, at most, before the VM ran on.
    pub(super) fn thrown_away(&mut self, at_most: u64) {
        self.thrown_away_at_most = self.thrown_away_at_most.saturating_add(at_most);
    }

    /// Notes what was translated so far.
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
            // A running one is kept: limits on migrations at once keep those below `RECORDS`.
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

    /// Changes a record that is still there.
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

    /// Notes what was sent on for an address, at the last migration that has sent on for it.
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

    /// Notes what was translated for an address at a TAP, at the migration that has brought its VM.
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

    /// Returns a record by its number.
    pub(super) fn get(&self, number: u64) -> Option<&MigrationRecord> {
        self.records.iter().rev().find(|r| r.number == number)
    }

    /// All of them, oldest first.
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
