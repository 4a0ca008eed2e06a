//! The implementation of [`Hypervisor`] for libvirt.
//!
//! | thread | does |
//! |---|---|
//! | `libvirt-events` | runs libvirt's event loop; one per process, never calls libvirt back |
//! | `libvirt-watch` | connects, lists domains, reads the domains that events name, reconnects |
//! | `libvirt-migrate` | one per migration: makes the blocking call, and settles a lost libvirtd |
//! | `libvirt-progress` | one per migration, also of others: polls statistics, cancels |
//! | `libvirt-metadata` | writes this agent's name to the metadata of the domains |
//!
//! The event loop's thread sends the urgent events (suspended, resumed) itself, with the time of
//! arrival. The watching thread sends domains; it may be waiting for libvirtd.
//!
//! ```text
//! Connecting --- domains, Connected ---> Watching
//!     ^                                     |
//!     '------ Disconnected, back-off <------'   libvirtd is gone; domains run on
//! ```
//!
//! The watching thread reports only active domains; for a domain that is shut off it sends
//! [`HypervisorEvent::Gone`]. It reports an arriving domain once the domain runs, because libvirt
//! raises no event when it prepares a domain. The TAPs of the domain exist earlier; their MAC
//! addresses identify them.

mod config;
mod downtime;
mod error;
mod flags;
mod follow;
mod metadata;
mod migration;
mod settle;
mod sys;
mod watch;

use std::collections::{HashMap, HashSet};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use virt::connect::Connect;

use super::{EventSender, Hypervisor, MigrateRequest};
use crate::proto::{DomainUuid, HypervisorEvent};
pub use config::LibvirtConfig;
pub use downtime::DowntimeLimit;
pub use flags::{MigrateFlag, MigrateFlags, MigrateFlagsError};
use migration::Migration;
use watch::Work;

/// Why the agent cannot use libvirt at all. An unreachable libvirtd is not such an error: the agent
/// retries and sends [`HypervisorEvent::Disconnected`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LibvirtError {
    /// libvirt's event loop cannot run.
    #[error("libvirt's event loop cannot run: {reason}; check the installed libvirt")]
    EventLoop {
        /// Error text of libvirt or the system.
        reason: String,
    },
    /// The system refuses a thread.
    #[error("Cannot start the thread that watches libvirt: {reason}; raise the limit of threads")]
    Thread {
        /// Error text of the system.
        reason: String,
    },
}

/// Handle for one libvirtd. Dropping the handle ends the watching; running migrations continue.
#[derive(Debug)]
pub struct Libvirt {
    shared: Arc<Shared>,
    work: mpsc::Sender<Work>,
}

/// State that all threads share.
#[derive(Debug)]
struct Shared {
    config: LibvirtConfig,
    events: EventSender,
    /// The open connection; `None` while disconnected.
    connection: Mutex<Option<Connect>>,
    /// Outgoing migrations that this agent has started or follows.
    migrations: Mutex<HashMap<DomainUuid, Arc<Migration>>>,
    /// Domains whose CPUs have stopped for the switch to another host. A resume of such a domain
    /// here means that the migration has failed.
    departing: Mutex<HashSet<DomainUuid>>,
}

impl Shared {
    fn emit(&self, event: HypervisorEvent) {
        // Fails only if the agent is stopping and has dropped the receiver.
        let _ = self.events.send(event);
    }

    fn connection(&self) -> Option<Connect> {
        lock(&self.connection).clone()
    }
}

/// Locks a mutex. Every update is one call, so the value is consistent even after a panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Libvirt {
    /// Starts the threads that connect and watch. Returns at once.
    ///
    /// # Errors
    ///
    /// See [`LibvirtError`].
    pub fn start(config: LibvirtConfig, events: EventSender) -> Result<Self, LibvirtError> {
        sys::start_event_loop().map_err(|reason| LibvirtError::EventLoop { reason })?;
        let shared = Arc::new(Shared {
            config,
            events,
            connection: Mutex::default(),
            migrations: Mutex::default(),
            departing: Mutex::default(),
        });
        let no_thread = |error: std::io::Error| LibvirtError::Thread {
            reason: error.to_string(),
        };
        let agent = shared.config.metadata.clone();
        let names = agent
            .map(|agent| metadata::start(&shared, agent))
            .transpose()
            .map_err(no_thread)?;
        let (work, inbox) = mpsc::channel();
        thread::Builder::new()
            .name("libvirt-watch".to_owned())
            .spawn({
                let (shared, work) = (Arc::clone(&shared), work.clone());
                move || watch::run(&shared, names, &work, &inbox)
            })
            .map_err(no_thread)?;
        Ok(Self { shared, work })
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        let _ = self.work.send(Work::Stop);
    }
}

impl Hypervisor for Libvirt {
    fn migrate(&self, request: MigrateRequest) {
        migration::start(&self.shared, request);
    }

    fn follow(&self, uuid: DomainUuid) {
        follow::expect(&self.shared, uuid, follow::BEGIN);
    }

    fn abort(&self, uuid: DomainUuid) {
        migration::abort(&self.shared, uuid);
    }
}

#[cfg(test)]
mod tests;
