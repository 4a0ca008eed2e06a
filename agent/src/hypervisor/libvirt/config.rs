//! How the agent reaches libvirt, and how it migrates.

use std::time::Duration;

use virt_sys as sys;

/// Flags of `virDomainMigrateToURI3`, by libvirt's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrateFlags(u32);

/// Why flags cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MigrateFlagsError {
    /// No such flag.
    #[error("`{0}` is not a libvirt migration flag; use names such as VIR_MIGRATE_AUTO_CONVERGE")]
    Unknown(String),
    /// A flag that the migration of a multicast listener cannot do without.
    #[error(
        "The migration flag {0} is missing; add it, a listener moves live and from host to host"
    )]
    Missing(&'static str),
    /// A flag that the agent cannot migrate with.
    #[error("The migration flag {0} cannot be used; the agent moves running domains only")]
    Unusable(&'static str),
}

/// libvirt's names that may be used.
const NAMES: &[(&str, u32)] = &[
    ("VIR_MIGRATE_LIVE", sys::VIR_MIGRATE_LIVE),
    ("VIR_MIGRATE_PEER2PEER", sys::VIR_MIGRATE_PEER2PEER),
    ("VIR_MIGRATE_TUNNELLED", sys::VIR_MIGRATE_TUNNELLED),
    ("VIR_MIGRATE_PERSIST_DEST", sys::VIR_MIGRATE_PERSIST_DEST),
    (
        "VIR_MIGRATE_UNDEFINE_SOURCE",
        sys::VIR_MIGRATE_UNDEFINE_SOURCE,
    ),
    (
        "VIR_MIGRATE_NON_SHARED_DISK",
        sys::VIR_MIGRATE_NON_SHARED_DISK,
    ),
    (
        "VIR_MIGRATE_NON_SHARED_INC",
        sys::VIR_MIGRATE_NON_SHARED_INC,
    ),
    (
        "VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES",
        sys::VIR_MIGRATE_NON_SHARED_SYNCHRONOUS_WRITES,
    ),
    (
        "VIR_MIGRATE_CHANGE_PROTECTION",
        sys::VIR_MIGRATE_CHANGE_PROTECTION,
    ),
    ("VIR_MIGRATE_UNSAFE", sys::VIR_MIGRATE_UNSAFE),
    ("VIR_MIGRATE_COMPRESSED", sys::VIR_MIGRATE_COMPRESSED),
    (
        "VIR_MIGRATE_ABORT_ON_ERROR",
        sys::VIR_MIGRATE_ABORT_ON_ERROR,
    ),
    ("VIR_MIGRATE_AUTO_CONVERGE", sys::VIR_MIGRATE_AUTO_CONVERGE),
    ("VIR_MIGRATE_RDMA_PIN_ALL", sys::VIR_MIGRATE_RDMA_PIN_ALL),
    ("VIR_MIGRATE_TLS", sys::VIR_MIGRATE_TLS),
    ("VIR_MIGRATE_PARALLEL", sys::VIR_MIGRATE_PARALLEL),
    ("VIR_MIGRATE_ZEROCOPY", sys::VIR_MIGRATE_ZEROCOPY),
    ("VIR_MIGRATE_PAUSED", sys::VIR_MIGRATE_PAUSED),
    ("VIR_MIGRATE_OFFLINE", sys::VIR_MIGRATE_OFFLINE),
    ("VIR_MIGRATE_POSTCOPY", sys::VIR_MIGRATE_POSTCOPY),
    (
        "VIR_MIGRATE_POSTCOPY_RESUME",
        sys::VIR_MIGRATE_POSTCOPY_RESUME,
    ),
];
const NEEDED: &[&str] = &["VIR_MIGRATE_LIVE", "VIR_MIGRATE_PEER2PEER"];
const UNUSABLE: &[&str] = &[
    "VIR_MIGRATE_PAUSED",
    "VIR_MIGRATE_OFFLINE",
    "VIR_MIGRATE_POSTCOPY",
    "VIR_MIGRATE_POSTCOPY_RESUME",
];

impl MigrateFlags {
    /// Reads flags by libvirt's names.
    ///
    /// # Errors
    ///
    /// See [`MigrateFlagsError`].
    pub fn from_names<S: AsRef<str>>(names: &[S]) -> Result<Self, MigrateFlagsError> {
        let mut flags = 0;
        for name in names {
            let name = name.as_ref();
            let Some((_, flag)) = NAMES.iter().find(|(known, _)| *known == name) else {
                return Err(MigrateFlagsError::Unknown(name.to_owned()));
            };
            if let Some(name) = UNUSABLE.iter().find(|unusable| **unusable == name) {
                return Err(MigrateFlagsError::Unusable(name));
            }
            flags |= flag;
        }
        let given = |name: &&&str| names.iter().any(|given| given.as_ref() == **name);
        match NEEDED.iter().find(|name| !given(name)) {
            Some(name) => Err(MigrateFlagsError::Missing(name)),
            None => Ok(Self(flags)),
        }
    }

    /// As libvirt's number.
    pub(super) fn bits(self) -> u32 {
        self.0
    }
}

impl Default for MigrateFlags {
    /// Live, from libvirtd to libvirtd, and the domain's definition moves along.
    fn default() -> Self {
        Self(
            sys::VIR_MIGRATE_LIVE
                | sys::VIR_MIGRATE_PEER2PEER
                | sys::VIR_MIGRATE_PERSIST_DEST
                | sys::VIR_MIGRATE_UNDEFINE_SOURCE,
        )
    }
}

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
    pub downtime_limit: Option<Duration>,
    /// Connections that memory is sent over in parallel; `None` for one.
    pub parallel_connections: Option<u16>,
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
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_read_by_libvirts_names() {
        let flags = MigrateFlags::from_names(&[
            "VIR_MIGRATE_LIVE",
            "VIR_MIGRATE_PEER2PEER",
            "VIR_MIGRATE_PERSIST_DEST",
            "VIR_MIGRATE_UNDEFINE_SOURCE",
        ]);
        assert_eq!(flags, Ok(MigrateFlags::default()));
    }

    #[test]
    fn unknown_missing_and_unusable_flags_are_named() {
        let parse = |names: &[&str]| MigrateFlags::from_names(names).unwrap_err();
        assert_eq!(
            parse(&["VIR_MIGRATE_FAST"]),
            MigrateFlagsError::Unknown("VIR_MIGRATE_FAST".to_owned())
        );
        assert_eq!(
            parse(&["VIR_MIGRATE_LIVE"]),
            MigrateFlagsError::Missing("VIR_MIGRATE_PEER2PEER")
        );
        assert_eq!(
            parse(&["VIR_MIGRATE_LIVE", "VIR_MIGRATE_OFFLINE"]),
            MigrateFlagsError::Unusable("VIR_MIGRATE_OFFLINE")
        );
    }
}
