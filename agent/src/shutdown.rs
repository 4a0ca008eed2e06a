//! The signals that end the agent.
//!
//! Pinned programs and maps keep working without the agent, and libvirt owns running migrations.
//! The agent therefore stops in no particular order and only closes its sockets.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Waits for SIGTERM or SIGINT. [`Shutdown::new`] installs the handlers.
#[derive(Debug)]
pub struct Shutdown {
    terminate: Signal,
    interrupt: Signal,
}

impl Shutdown {
    /// Installs the handlers. The caller must be within a tokio runtime.
    ///
    /// # Errors
    ///
    /// The system refuses a handler.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Waits for a signal and returns its name. Cancel safe.
    pub async fn recv(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, raise};

    #[tokio::test]
    async fn sigterm_is_received() {
        let mut shutdown = Shutdown::new().unwrap();
        raise(Signal::SIGTERM).unwrap();
        assert_eq!(shutdown.recv().await, "SIGTERM");
    }
}
