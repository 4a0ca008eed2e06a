//! `[libvirt]`.

use std::time::Duration;

use serde::Deserialize;

use super::super::value;
use crate::hypervisor::libvirt::{MigrateFlag, MigrateFlags, MigrateFlagsError};
use crate::proto::{Carrier, CopyConfig, Encrypt};

/// Connection to libvirt, and parameters of the migrations that it runs.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Libvirt {
    /// URI of this host's libvirtd.
    #[serde(deserialize_with = "value::uri")]
    pub uri: String,
    /// Migration flags.
    pub flags: Vec<MigrateFlag>,
    /// When QEMU or libvirt encrypts the copied memory.
    pub encrypt: Encrypt,
    /// Highest bandwidth of a migration, MiB/s; 0: the agent sets no limit.
    #[serde(deserialize_with = "value::ranged::<0, 1_000_000, _, _>")]
    pub bandwidth_mib: u64,
    /// Pause of the VM that QEMU aims at first.
    #[serde(
        rename = "downtime_ms",
        deserialize_with = "value::milliseconds::<1, 60_000, _>"
    )]
    pub downtime: Duration,
    /// Limit for that pause, which grows while the copy does not converge.
    #[serde(
        rename = "max_downtime_ms",
        deserialize_with = "value::milliseconds::<1, 60_000, _>"
    )]
    pub max_downtime: Duration,
    /// Parallel connections for the memory; 0: one connection, without `VIR_MIGRATE_PARALLEL`.
    #[serde(deserialize_with = "value::ranged::<0, 255, _, _>")]
    pub parallel_connections: u32,
    /// True: the agent writes its name to the metadata of this host's domains. A destination then
    /// finds the source's agent when somebody else migrates a domain.
    pub metadata: bool,
}

impl Default for Libvirt {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            flags: MigrateFlag::DEFAULT.to_vec(),
            encrypt: Encrypt::Auto,
            bandwidth_mib: 0,
            downtime: Duration::from_millis(50),
            max_downtime: Duration::from_millis(300),
            parallel_connections: 0,
            metadata: true,
        }
    }
}

impl Libvirt {
    /// Combines the flags, with `VIR_MIGRATE_PARALLEL` if `parallel_connections` is set.
    ///
    /// # Errors
    ///
    /// [`MigrateFlagsError`] if the flags contradict each other; in a [`super::Config`] they never
    /// do.
    pub fn migrate_flags(&self) -> Result<MigrateFlags, MigrateFlagsError> {
        MigrateFlags::new(&self.flags, self.parallel_connections > 0)
    }

    /// Returns the settings that concern the copy of memory.
    pub fn copy(&self) -> CopyConfig {
        let flags = self.migrate_flags().unwrap_or_default();
        CopyConfig {
            encrypt: self.encrypt,
            carrier: flags.carrier(),
        }
    }

    /// Returns why `encrypt` and the flags contradict each other, if they do.
    pub(super) fn encrypt_conflict(&self) -> Option<&'static str> {
        match (self.encrypt, self.copy().carrier) {
            (Encrypt::Never, Carrier::Tls) => {
                Some("\"never\" contradicts VIR_MIGRATE_TLS in libvirt.flags; drop one")
            }
            (Encrypt::Always, Carrier::Zerocopy) => Some(
                "\"always\" contradicts VIR_MIGRATE_ZEROCOPY in libvirt.flags, which does not go with TLS; drop one",
            ),
            _ => None,
        }
    }
}
