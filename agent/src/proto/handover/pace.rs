//! Rate at which a guest receives its held frames.
//!
//! A guest that resumes after a pause does not get the frames of the whole pause at once. The receive
//! buffer of an ordinary application holds some 90 packets (`net.core.rmem_default`, 208 KiB of `skb`
//! memory), and a driver delivers a full ring before any application runs. Caches are cold, too, so the
//! guest is slow at that moment, and the frames in the ring precede whatever the application waits for.
//! So the first packet is sent alone, and each next burst follows when the hypervisor has read the
//! burst before:
//!
//! ```text
//!  put   1 |. . . . . . .|  2   4   8   16   32   64 64 ...   128 if the backlog grows nevertheless
//!           while paused  ^   each 8 ms          each 1 ms
//!                         the hypervisor reads it: the guest runs
//! ```
//!
//! A guest that does not catch up within [`TIME`] gets the rest in one burst, so that the gate opens.
//! The TAP's queue is an equally good place to wait.

use std::time::Duration;

use crate::proto::Timestamp;

/// Frames of the first burst; the read of this burst proves that the guest runs.
const FIRST_BURST: u64 = 1;
/// Maximum frames of a burst while the backlog shrinks.
const LARGE_BURST: u64 = 64;
/// Minimum time between two bursts.
const INTERVAL: Duration = Duration::from_millis(1);
/// Minimum time between two small bursts.
const EARLY_INTERVAL: Duration = Duration::from_millis(8);
/// Duration of the limit, from the read of the first burst on.
const TIME: Duration = Duration::from_secs(1);

/// Limits the number of frames that may enter a TAP at a time.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Frames that the hypervisor had read at the start.
    read: u64,
    /// Frames sent into the TAP since the start.
    sent: u64,
    /// Frames that may be sent now.
    allowed: u64,
    burst: u64,
    /// Number of waiting frames at the last burst.
    backlog: usize,
    due: Timestamp,
    /// End of the limit; `None` until the first burst is read.
    until: Option<Timestamp>,
}

impl Pace {
    /// Starts with the first burst. `read` is the number of frames that the hypervisor has read so far.
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

    /// Returns true if [`Pace::look`] may have an effect.
    pub fn is_due(&self, now: Timestamp) -> bool {
        now >= self.due
    }

    /// Allows the next burst once the burst before was read. `read` is the number of frames that the
    /// hypervisor has read so far, `None` if unknown; `backlog` is the number of waiting frames.
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

    /// Returns true if another frame may enter the TAP.
    pub fn allows(&self) -> bool {
        self.allowed > 0
    }

    /// Counts a frame that entered the TAP.
    pub fn sent(&mut self) {
        self.sent += 1;
        self.allowed = self.allowed.saturating_sub(1);
    }

    /// Returns the hypervisor's read count once all sent frames are read.
    pub fn expected(&self) -> u64 {
        self.read + self.sent
    }
}

#[cfg(test)]
mod tests;
