//! Waiting for a condition with a deadline.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use crate::{machine, signal};

/// Pause between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Returns how long something may take that takes `limit` on a plain machine at worst.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    if machine::inside() {
        limit * machine::SLOWNESS
    } else {
        limit
    }
}

/// Returns when a wait ends that begins now, with [`patience`].
#[must_use]
pub fn end_after(limit: Duration) -> Instant {
    Instant::now() + patience(limit)
}

/// Waits until `condition` returns a value and returns that. The deadline is subject to
/// [`patience`].
///
/// # Errors
///
/// When `deadline` has passed; the text names `what` was waited for. Also when the process was
/// interrupted, as by Ctrl-C, and owns a lab.
pub fn until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> Result<T> {
    always_until(what, deadline, || {
        if signal::interrupted() {
            return Some(Err(anyhow!("Interrupted while waiting for {what}")));
        }
        condition().map(Ok)
    })?
}

/// As [`until`], but goes on when the process was interrupted: for removing things.
pub(crate) fn always_until<T>(
    what: &str,
    deadline: Duration,
    mut condition: impl FnMut() -> Option<T>,
) -> Result<T> {
    let end = end_after(deadline);
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if Instant::now() >= end {
            bail!("Waited {deadline:?} in vain for {what}");
        }
        thread::sleep(POLL_INTERVAL);
    }
}
