//! The signals that end the agent.
//!
//! What is pinned goes on working without the agent, so its end needs no order: sockets are
//! closed, running migrations are libvirt's.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Waits for SIGTERM or SIGINT. The handlers are in force from [`Shutdown::new`] on.
#[derive(Debug)]
pub struct Shutdown {
    terminate: Signal,
    interrupt: Signal,
}

impl Shutdown {
    /// Installs the handlers. Must be called within a tokio runtime.
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

    /// Returns the name of the signal that came. May be dropped and called again.
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
