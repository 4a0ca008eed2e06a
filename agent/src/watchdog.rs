//! systemd's watchdog (`WatchdogSec=`): the loop of each role shows by itself that it goes round.

use std::time::Duration;

use common::heartbeat::Heartbeat;
use sd_notify::NotifyState;

use crate::clock;
use crate::proto::Timestamp;

/// How long a loop may wait where nobody watches it.
const IDLE: Duration = Duration::from_secs(3600);

/// What systemd waits for, if it does.
#[derive(Debug)]
pub struct Watchdog {
    heartbeat: Heartbeat,
}

impl Watchdog {
    /// As systemd has started this process.
    pub fn of_systemd() -> Self {
        Self {
            heartbeat: Heartbeat::new(sd_notify::watchdog_enabled()),
        }
    }

    /// Shows that the loop goes round, if it is time. Returns how long it may wait before it comes here
    /// again.
    pub fn beat(&mut self) -> Duration {
        let now = clock::now().since(Timestamp(0));
        if self.heartbeat.is_due(now)
            && let Err(error) = sd_notify::notify(&[NotifyState::Watchdog])
        {
            tracing::warn!(%error, "systemd's watchdog cannot be told that all is well");
        }
        let due = self.heartbeat.poll_timeout();
        due.map_or(IDLE, |due| due.saturating_sub(now).min(IDLE))
    }
}
