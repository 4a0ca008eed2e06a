//! Deadlines of the protocol, and the queue of the next deadline.

use std::collections::{BTreeMap, BTreeSet};

use common::maps::ManagedKey;

use super::Timestamp;

/// A deadline. A `u64` is the number of a migration's record, if not stated otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// End of the wait for the flows of a departing domain's addresses.
    Streams(u64),
    /// End of the wait for `AgentResponse`.
    Response(u64),
    /// Next request to a destination host that had no place.
    Again(u64),
    /// End of the wait for the VM's `MigrationReady`.
    Ready(u64),
    /// Next connection attempt to the destination host of a running migration.
    Reconnect(u64),
    /// End of the attempts to tell the destination host how a migration ended.
    Closing(u64),
    /// End of the wait for the missing cuts of a departed domain.
    LateCuts(u64),
    /// Decision of a probe that has seen no packet.
    Probe(ManagedKey),
    /// End of an arrival without further messages.
    Unused(u64),
    /// Release of the addresses that an arrived VM never reported.
    Hold(u64),
    /// Decision whether a claimed address is unique, or whether its VM stays silent.
    Claim(u64),
    /// Next check of the forwarding for departed VMs.
    Forwards,
    /// Next check of the translation for arrived VMs.
    Translations,
    /// Maximum closed time of a TAP's gate, by ifindex.
    Gate(u32),
    /// Replay for an arrived VM without a cut.
    Cut(u64),
    /// Next reading of the listeners that an arrived VM should report.
    Poll(u64),
    /// Next renewal of an arriving VM's MDB entries.
    MdbRenewal(u64),
    /// End of the wait of libvirt's hook, by the number of its command.
    Preparation(u64),
    /// Next state of an address's reception without an event.
    Reception(ManagedKey),
    /// Renewal of a relay session, an overdue answer, or the next request to a relay.
    Session(ManagedKey),
    /// Next reading of the flows that may fall silent or return.
    Watch,
    /// Next connection attempt to the relay with this number.
    Relay(u64),
    /// Time at which the next listener or source may expire.
    Ageing,
    /// Next reading of the ports' usage.
    Usage,
}

/// Armed deadlines.
#[derive(Debug)]
pub(super) struct TimerTable<T = Timer> {
    deadlines: BTreeMap<T, Timestamp>,
    queue: BTreeSet<(Timestamp, T)>,
}

impl<T> Default for TimerTable<T> {
    fn default() -> Self {
        Self {
            deadlines: BTreeMap::new(),
            queue: BTreeSet::new(),
        }
    }
}

impl<T: Copy + Ord> TimerTable<T> {
    /// Arms or moves a deadline.
    pub(super) fn set(&mut self, timer: T, deadline: Timestamp) {
        self.stop(timer);
        self.deadlines.insert(timer, deadline);
        self.queue.insert((deadline, timer));
    }

    /// Arms a deadline unless an earlier one is armed.
    pub(super) fn set_earlier(&mut self, timer: T, deadline: Timestamp) {
        if self.get(timer).is_none_or(|set| deadline < set) {
            self.set(timer, deadline);
        }
    }

    /// Disarms a deadline.
    pub(super) fn stop(&mut self, timer: T) {
        if let Some(deadline) = self.deadlines.remove(&timer) {
            self.queue.remove(&(deadline, timer));
        }
    }

    /// Returns the deadline of a timer; `None` if not armed.
    pub(super) fn get(&self, timer: T) -> Option<Timestamp> {
        self.deadlines.get(&timer).copied()
    }

    /// Returns the earliest deadline; `None` if no timer is armed.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.queue.first().map(|(deadline, _)| *deadline)
    }

    /// Disarms and returns the earliest timer due at `now`.
    pub(super) fn expire(&mut self, now: Timestamp) -> Option<T> {
        let (_, timer) = *self
            .queue
            .first()
            .filter(|(deadline, _)| *deadline <= now)?;
        self.stop(timer);
        Some(timer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_expire_in_order_of_their_deadlines() {
        let mut table = TimerTable::default();
        table.set(Timer::Ready(1), Timestamp(30));
        table.set(Timer::Usage, Timestamp(10));
        table.set(Timer::Response(1), Timestamp(20));
        assert_eq!(table.next(), Some(Timestamp(10)));
        assert_eq!(table.expire(Timestamp(20)), Some(Timer::Usage));
        assert_eq!(table.expire(Timestamp(20)), Some(Timer::Response(1)));
        assert_eq!(table.expire(Timestamp(20)), None);
        assert_eq!(table.next(), Some(Timestamp(30)));
    }

    #[test]
    fn timer_set_again_is_due_once() {
        let mut table = TimerTable::default();
        table.set(Timer::Usage, Timestamp(10));
        table.set(Timer::Usage, Timestamp(20));
        assert_eq!(table.expire(Timestamp(15)), None);
        assert_eq!(table.expire(Timestamp(25)), Some(Timer::Usage));
        assert_eq!(table.expire(Timestamp(25)), None);
    }

    #[test]
    fn stopped_timer_never_expires() {
        let mut table = TimerTable::default();
        table.set(Timer::Usage, Timestamp(10));
        table.stop(Timer::Usage);
        assert_eq!(table.next(), None);
    }
}
