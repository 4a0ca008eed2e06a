//! Waiting for a condition with a deadline.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};

use crate::signal;

/// Pause between two looks at a condition.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until `condition` returns a value and returns that.
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
    let end = Instant::now() + deadline;
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
