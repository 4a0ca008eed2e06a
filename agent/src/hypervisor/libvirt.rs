//! libvirt as the [`Hypervisor`].
//!
//! | thread | does |
//! |---|---|
//! | `libvirt-events` | runs libvirt's event loop; one per process, never calls libvirt back |
//! | `libvirt-watch` | connects, lists domains, looks at those that events name, connects again |
//! | `libvirt-migrate` | one per migration: the blocking call, and what to do if libvirtd was lost |
//! | `libvirt-progress` | one per migration, those of others too: polls statistics, cancels |
//! | `libvirt-metadata` | leaves this agent's name with the domains |
//!
//! What is urgent (suspended, resumed) is sent from the event loop's thread with the time it came
//! in; domains follow from the watching thread, which may be waiting for libvirtd.
//!
//! ```text
//! Connecting --- domains, Connected ---> Watching
//!     ^                                     |
//!     '------ Disconnected, back-off <------'   libvirtd is gone; domains run on
//! ```
//!
//! Only active domains are reported; one that is shut off is [`HypervisorEvent::Gone`]. A domain that
//! arrives is reported when it runs: libvirt raises no event when it prepares one. Its TAPs are
//! there before, and known by their MAC.

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

/// Why libvirt cannot be used at all. That libvirtd does not answer is no such reason: the agent
/// goes on trying, and says so by [`HypervisorEvent::Disconnected`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LibvirtError {
    /// libvirt's event loop cannot run.
    #[error("libvirt's event loop cannot run: {reason}; check the installed libvirt")]
    EventLoop {
        /// What libvirt or the system said.
        reason: String,
    },
    /// A thread could not be made.
    #[error("Cannot start the thread that watches libvirt: {reason}; raise the limit of threads")]
    Thread {
        /// What the system said.
        reason: String,
    },
}

/// A libvirtd. Dropping it ends the watching; migrations that run go on.
#[derive(Debug)]
pub struct Libvirt {
    shared: Arc<Shared>,
    work: mpsc::Sender<Work>,
}

/// What all threads share.
#[derive(Debug)]
struct Shared {
    config: LibvirtConfig,
    events: EventSender,
    /// The connection while it is up.
    connection: Mutex<Option<Connect>>,
    /// Outgoing migrations that this agent has started or follows.
    migrations: Mutex<HashMap<DomainUuid, Arc<Migration>>>,
    /// Domains whose CPUs have stopped for the switch to another host: a resume here then means
    /// that the migration has failed.
    departing: Mutex<HashSet<DomainUuid>>,
}

impl Shared {
    fn emit(&self, event: HypervisorEvent) {
        // The receiver goes first when the agent stops.
        let _ = self.events.send(event);
    }

    fn connection(&self) -> Option<Connect> {
        lock(&self.connection).clone()
    }
}

/// Locks; what a panicking thread has left is still consistent, since every update is one call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Libvirt {
    /// Starts to connect and to watch; returns at once.
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
