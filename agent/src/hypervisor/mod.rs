//! The hypervisor: domains, their TAPs, live migration.
//!
//! [`Hypervisor`] is what the agent asks of it; [`libvirt`] is the real one. Everything is
//! asynchronous by events, so that no libvirt call ever blocks the agent.

pub mod copy_tls;
pub mod domain_xml;
pub mod libvirt;
pub mod main_loop;
pub mod metadata;
mod settings;
pub mod trust;

use crate::proto::{DomainUuid, HypervisorEvent};

/// Where a migration goes and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateRequest {
    /// The domain.
    pub uuid: DomainUuid,
    /// libvirt URI of the destination (`qemu+tls://[2001:db8::2]/system`).
    pub connect_uri: String,
    /// Where QEMU sends memory to (`tcp://[2001:db8::2]`); empty to let libvirt choose.
    pub migrate_uri: String,
    /// Whether QEMU is to encrypt it (`VIR_MIGRATE_TLS`).
    pub tls: bool,
}

/// A hypervisor. Calls return at once; what comes of them is sent as [`HypervisorEvent`]s over the
/// channel that the implementation was made with.
pub trait Hypervisor: Send + Sync {
    /// Starts a live migration; ends with [`HypervisorEvent::MigrationEnded`], always.
    fn migrate(&self, request: MigrateRequest);

    /// Follows a live migration that somebody else has begun or is about to begin; ends as
    /// [`Hypervisor::migrate`], also where there is none.
    fn follow(&self, uuid: DomainUuid);

    /// Cancels the migration of a domain, if one runs.
    fn abort(&self, uuid: DomainUuid);
}

/// The channel that events go to.
pub type EventSender = tokio::sync::mpsc::UnboundedSender<HypervisorEvent>;
