//! Waiting for a condition with a deadline.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use crate::{machine, signal};

/// Pause between two checks of a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Returns the time limit on this machine for an operation that takes at most `limit` on a plain
/// machine: longer in the emulated host machine.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    if machine::inside() {
        limit * machine::SLOWNESS
    } else {
        limit
    }
}

/// Returns the end of a wait that begins now and lasts for [`patience`].
#[must_use]
pub fn end_after(limit: Duration) -> Instant {
    Instant::now() + patience(limit)
}

/// Waits until `condition` returns a value, and returns the value. The deadline is extended by
/// [`patience`].
///
/// # Errors
///
/// When `deadline` passes first; the text names `what`. Also when the process was interrupted, as
/// by Ctrl-C, and owns a lab.
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

/// Like [`until`], but continues after an interruption of the process: for steps that remove
/// things.
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
