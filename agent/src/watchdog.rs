//! systemd's watchdog (`WatchdogSec=`): the event loop of each role notifies systemd.

use std::time::Duration;

use common::heartbeat::Heartbeat;
use sd_notify::NotifyState;

use crate::clock;
use crate::proto::Timestamp;

/// Longest sleep of a loop without a watchdog.
const IDLE: Duration = Duration::from_secs(3600);

/// Timer of the watchdog's notifications; idle if systemd expects none.
#[derive(Debug)]
pub struct Watchdog {
    heartbeat: Heartbeat,
}

impl Watchdog {
    /// Creates the timer from systemd's environment variables.
    pub fn of_systemd() -> Self {
        Self {
            heartbeat: Heartbeat::new(sd_notify::watchdog_enabled()),
        }
    }

    /// Notifies systemd if a notification is due. Returns the longest time until the next call.
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
