//! How fast a guest gets what was held for it.
//!
//! A guest that runs again after a pause is not given the whole pause in one piece: the receive
//! buffer of an ordinary application holds some 90 packets (`net.core.rmem_default`, 208 KiB of
//! `skb` memory), and a driver hands over a full ring before any application runs. Its caches are
//! cold too, so that it is slow just then, and what waits in the ring is before what the application
//! waits for. So the first packet comes alone, and the next burst when the hypervisor has read the
//! one before:
//!
//! ```text
//!  put   1 |. . . . . . .|  2   4   8   16   32   64 64 ...   128 if the backlog grows nevertheless
//!           while paused  ^   each 8 ms          each 1 ms
//!                         the hypervisor reads it: the guest runs
//! ```
//!
//! A guest that does not catch up within [`TIME`] gets the rest in one piece, so that the gate opens:
//! the queue of the TAP is as good a place to wait.

use std::time::Duration;

use crate::proto::Timestamp;

/// Frames of the first burst: what shows that the guest runs.
const FIRST_BURST: u64 = 1;
/// Frames of a burst that is not exceeded as long as the backlog shrinks.
const LARGE_BURST: u64 = 64;
/// Least time between two bursts.
const INTERVAL: Duration = Duration::from_millis(1);
/// The same while bursts are small.
const EARLY_INTERVAL: Duration = Duration::from_millis(8);
/// How long bursts are limited, from when the first one was read.
const TIME: Duration = Duration::from_secs(1);

/// Says when how many frames may be put into a TAP.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Frames that the hypervisor had read when it began.
    read: u64,
    /// Frames put into the TAP since then.
    sent: u64,
    /// Frames that may be put there now.
    allowed: u64,
    burst: u64,
    /// What was waiting at the last burst.
    backlog: usize,
    due: Timestamp,
    /// Since the first burst was read.
    until: Option<Timestamp>,
}

impl Pace {
    /// Begins with a first burst. `read` is how many frames the hypervisor has read so far.
    pub fn new(now: Timestamp, read: u64) -> Self {
        Self {
            read,
            sent: 0,
            allowed: FIRST_BURST,
            burst: FIRST_BURST,
            backlog: usize::MAX,
            due: now + INTERVAL,
            until: None,
        }
    }

    /// Whether [`Pace::look`] is worth its while.
    pub fn is_due(&self, now: Timestamp) -> bool {
        now >= self.due
    }

    /// Allows the next burst once the one before was read. `read` is how many frames the hypervisor
    /// has read so far, `None` if that is not known; `backlog` how many wait.
    pub fn look(&mut self, now: Timestamp, read: Option<u64>, backlog: usize) {
        if !self.is_due(now) {
            return;
        }
        self.due = now + INTERVAL;
        if self.until.is_some_and(|until| now >= until) {
            self.allowed = u64::MAX;
            return;
        }
        if read.is_some_and(|read| read < self.expected()) {
            return;
        }
        self.until.get_or_insert(now + TIME);
        if self.burst < LARGE_BURST || backlog >= self.backlog {
            self.burst = self.burst.saturating_mul(2);
        }
        self.backlog = backlog;
        self.allowed = self.burst;
        if self.burst < LARGE_BURST {
            self.due = now + EARLY_INTERVAL;
        }
    }

    /// Whether another frame may be put into the TAP.
    pub fn allows(&self) -> bool {
        self.allowed > 0
    }

    /// A frame was put into the TAP.
    pub fn sent(&mut self) {
        self.sent += 1;
        self.allowed = self.allowed.saturating_sub(1);
    }

    /// What the hypervisor has read at least when it has read everything that was put there.
    pub fn expected(&self) -> u64 {
        self.read + self.sent
    }
}

#[cfg(test)]
#[path = "tests/pace.rs"]
mod tests;
