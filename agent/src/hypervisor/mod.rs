//! The hypervisor: domains, their TAPs, live migration.
//!
//! [`Hypervisor`] lists the operations that the agent needs; [`libvirt`] implements them. Results
//! arrive as events, so no libvirt call ever blocks the agent.

pub mod copy_tls;
pub mod domain_xml;
pub mod libvirt;
pub mod main_loop;
pub mod metadata;
mod settings;
pub mod trust;

use crate::proto::{DomainUuid, HypervisorEvent};

/// Parameters of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateRequest {
    /// Domain to migrate.
    pub uuid: DomainUuid,
    /// libvirt URI of the destination (`qemu+tls://[2001:db8::2]/system`).
    pub connect_uri: String,
    /// URI to which QEMU sends memory (`tcp://[2001:db8::2]`); empty: libvirt chooses.
    pub migrate_uri: String,
    /// True: QEMU encrypts the memory (`VIR_MIGRATE_TLS`).
    pub tls: bool,
}

/// Operations on a hypervisor. Calls return at once; results arrive as [`HypervisorEvent`]s on the
/// channel that the implementation was created with.
pub trait Hypervisor: Send + Sync {
    /// Starts a live migration. [`HypervisorEvent::MigrationEnded`] always follows.
    fn migrate(&self, request: MigrateRequest);

    /// Follows a live migration that another libvirt client has started or is about to start.
    /// [`HypervisorEvent::MigrationEnded`] always follows, even if there is no migration.
    fn follow(&self, uuid: DomainUuid);

    /// Cancels the migration of a domain if one is running.
    fn abort(&self, uuid: DomainUuid);
}

/// Channel for the hypervisor's events.
pub type EventSender = tokio::sync::mpsc::UnboundedSender<HypervisorEvent>;
