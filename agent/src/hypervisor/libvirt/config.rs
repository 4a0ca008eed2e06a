//! Parameters of the connection to libvirt and of migrations.

use super::downtime::DowntimeLimit;
use super::flags::MigrateFlags;
use crate::value::Name;

/// Configuration of [`super::Libvirt`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtConfig {
    /// URI of the local libvirtd.
    pub uri: String,
    /// The managed bridge. The agent ignores NICs on other bridges.
    pub bridge: String,
    /// Flags of every migration.
    pub flags: MigrateFlags,
    /// Highest bandwidth of a migration, MiB/s; `None`: libvirt's own limit.
    pub bandwidth: Option<u64>,
    /// Pause of the CPUs that QEMU aims at; `None`: QEMU's own limit.
    pub downtime_limit: Option<DowntimeLimit>,
    /// Parallel connections for the memory; `None`: one connection.
    pub parallel_connections: Option<u16>,
    /// Name for the metadata of every active domain; `None`: no metadata.
    pub metadata: Option<Name>,
}

impl Default for LibvirtConfig {
    fn default() -> Self {
        Self {
            uri: "qemu:///system".to_owned(),
            bridge: "br0".to_owned(),
            flags: MigrateFlags::default(),
            bandwidth: None,
            downtime_limit: None,
            parallel_connections: None,
            metadata: None,
        }
    }
}
