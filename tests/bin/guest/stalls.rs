//! Stalls: times at which an application that could run does not run, while the machine is paused
//! and for a while afterwards.

use std::{
    sync::{Arc, Once},
    thread,
    time::Duration,
};

use lab::{guest::wire::FromGuest, probe::clock};

use crate::outbox::Outbox;

/// Duration of each sleep of the watching thread.
const INTERVAL: Duration = Duration::from_millis(2);
/// Shortest reported stall, nanoseconds; shorter delays are normal for a scheduler.
const STALL_NS: u64 = 5_000_000;

/// Watches for stalls once the host asks for it.
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

    /// Starts to watch, in a thread with the priority of a receiver.
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
