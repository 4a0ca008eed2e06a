//! How the agent reaches libvirt, and how it migrates.

use super::downtime::DowntimeLimit;
use super::flags::MigrateFlags;
use crate::config::Name;

/// Configuration of [`super::Libvirt`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtConfig {
    /// URI of the local libvirtd.
    pub uri: String,
    /// The managed bridge; NICs on others are left alone.
    pub bridge: String,
    /// Flags of every migration.
    pub flags: MigrateFlags,
    /// Most that a migration may send, MiB/s; `None` for libvirt's own limit.
    pub bandwidth: Option<u64>,
    /// Longest pause of the CPUs that QEMU aims at; `None` for its own limit.
    pub downtime_limit: Option<DowntimeLimit>,
    /// Connections that memory is sent over in parallel; `None` for one.
    pub parallel_connections: Option<u16>,
    /// Name that is left with every running domain; `None` for none.
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
