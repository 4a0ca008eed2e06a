//! When an application that wants to run does not: while the machine is paused, and for a while
//! after it.

use std::{
    sync::{Arc, Once},
    thread,
    time::Duration,
};

use lab::{guest::wire::FromGuest, probe::clock};

use crate::outbox::Outbox;

/// How long the thread sleeps at a time.
const INTERVAL: Duration = Duration::from_millis(2);
/// Shorter ones are an ordinary scheduler's, in nanoseconds.
const STALL_NS: u64 = 5_000_000;

/// Watches for stalls once it was asked to.
pub(crate) struct Stalls {
    outbox: Arc<Outbox>,
    started: Once,
}

impl Stalls {
    pub(crate) fn new(outbox: Arc<Outbox>) -> Self {
        Self {
            outbox,
            started: Once::new(),
        }
    }

    /// Watches from now on, in a thread like any other.
    pub(crate) fn watch(&self) {
        self.started.call_once(|| {
            let outbox = Arc::clone(&self.outbox);
            thread::spawn(move || {
                let _ = lab::guest::sys::run_first();
                let mut last_ns = clock::now_ns();
                loop {
                    thread::sleep(INTERVAL);
                    let now_ns = clock::now_ns();
                    if now_ns - last_ns > STALL_NS {
                        outbox.send_or_log(&FromGuest::Stall(last_ns, now_ns));
                    }
                    last_ns = now_ns;
                }
            });
        });
    }
}
