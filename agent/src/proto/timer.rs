//! Deadlines of the protocol: which there are, and which comes next.

use std::collections::{BTreeMap, BTreeSet};

use common::maps::ManagedKey;

use super::Timestamp;

/// One deadline. Numbers are those of migrations' records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// When to go on without the flows of a departing domain's addresses.
    Streams(u64),
    /// When to give up waiting for `AgentResponse`.
    Response(u64),
    /// When to ask a destination again that had no place.
    Again(u64),
    /// When to give up waiting for the VM's `MigrationReady`.
    Ready(u64),
    /// When to connect again to the destination of a running migration.
    Reconnect(u64),
    /// When to stop trying to tell the destination how a migration ended.
    Closing(u64),
    /// When to do without the cuts that are not placed of a domain that has left.
    LateCuts(u64),
    /// When a probe that has seen no packet is decided.
    Probe(ManagedKey),
    /// When to undo an arrival of which nothing more was heard.
    Unused(u64),
    /// When to release what an arrived VM never answered for.
    Hold(u64),
    /// When a claimed address counts as unique, or its VM has not spoken from it.
    Claim(u64),
    /// When to look at what is sent on for VMs that have left.
    Forwards,
    /// When to look at what is translated for VMs that have arrived.
    Translations,
    /// When the gate of a TAP has been closed for too long.
    Gate(u32),
    /// When an arrived VM gets what it may have missed without a cut.
    Cut(u64),
    /// When to read again what an arrived VM is expected to answer for.
    Poll(u64),
    /// When to make the MDB entries of an arriving VM again.
    MdbRenewal(u64),
    /// When libvirt's hook, by the number of its command, is kept waiting no longer.
    Preparation(u64),
    /// When the reception of an address goes on to its next state by itself.
    Reception(ManagedKey),
    /// When a relay session is to be renewed, or its answer is overdue, or a relay asked again.
    Session(ManagedKey),
    /// When to look at the flows that may fall silent or come back.
    Watch,
    /// When to connect again to the relay of that number.
    Relay(u64),
    /// When the next listener or source may be too old.
    Ageing,
    /// When to read the usage of the ports again.
    Usage,
}

/// The deadlines that are set.
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
    /// Sets or moves a deadline.
    pub(super) fn set(&mut self, timer: T, deadline: Timestamp) {
        self.stop(timer);
        self.deadlines.insert(timer, deadline);
        self.queue.insert((deadline, timer));
    }

    /// Sets a deadline unless it is set to an earlier one.
    pub(super) fn set_earlier(&mut self, timer: T, deadline: Timestamp) {
        if self.get(timer).is_none_or(|set| deadline < set) {
            self.set(timer, deadline);
        }
    }

    /// Removes a deadline.
    pub(super) fn stop(&mut self, timer: T) {
        if let Some(deadline) = self.deadlines.remove(&timer) {
            self.queue.remove(&(deadline, timer));
        }
    }

    /// Returns when a timer is due.
    pub(super) fn get(&self, timer: T) -> Option<Timestamp> {
        self.deadlines.get(&timer).copied()
    }

    /// Returns the earliest deadline.
    pub(super) fn next(&self) -> Option<Timestamp> {
        self.queue.first().map(|(deadline, _)| *deadline)
    }

    /// Removes and returns the earliest timer that is due at `now`.
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
