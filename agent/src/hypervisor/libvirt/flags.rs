//! Flags of `virDomainMigrateToURI3`: supported flags, and their combinations.

use serde::Deserialize;
use virt_sys as sys;

use crate::proto::Carrier;

/// A flag of `virDomainMigrateFlags` that the agent supports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct MigrateFlag(u32);

/// Set of flags with which a migration can start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MigrateFlags(u32);

/// Why a flag or a set of flags is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MigrateFlagsError {
    /// libvirt has no such flag, or the agent does not support it.
    #[error("\"{0}\" is no migration flag that the agent can use; see virDomainMigrateFlags")]
    Unusable(String),
    /// A mandatory flag is missing.
    #[error("{0} is missing; the agent cannot move a running domain without it")]
    Missing(&'static str),
    /// Two flags exclude each other.
    #[error("{0} and {1} exclude each other; drop one")]
    Excluded(&'static str, &'static str),
    /// A flag has no effect without parallel connections.
    #[error("{0} needs VIR_MIGRATE_PARALLEL; set parallel_connections")]
    NeedsParallel(&'static str),
}

/// Names and bits of libvirt's flags. Not supported: POSTCOPY (needs a second call), OFFLINE and
/// PAUSED (no live migration).
const FLAGS: &[(&str, u32)] = &[
    (LIVE, sys::VIR_MIGRATE_LIVE),
    (PEER2PEER, sys::VIR_MIGRATE_PEER2PEER),
    (TUNNELLED, sys::VIR_MIGRATE_TUNNELLED),
    ("VIR_MIGRATE_PERSIST_DEST", sys::VIR_MIGRATE_PERSIST_DEST),
    (
        "VIR_MIGRATE_UNDEFINE_SOURCE",
        sys::VIR_MIGRATE_UNDEFINE_SOURCE,
    ),
    (NON_SHARED_DISK, sys::VIR_MIGRATE_NON_SHARED_DISK),
    (NON_SHARED_INC, sys::VIR_MIGRATE_NON_SHARED_INC),
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
    (TLS, sys::VIR_MIGRATE_TLS),
    (PARALLEL, sys::VIR_MIGRATE_PARALLEL),
    (ZEROCOPY, sys::VIR_MIGRATE_ZEROCOPY),
];
const LIVE: &str = "VIR_MIGRATE_LIVE";
const PEER2PEER: &str = "VIR_MIGRATE_PEER2PEER";
const TUNNELLED: &str = "VIR_MIGRATE_TUNNELLED";
const NON_SHARED_DISK: &str = "VIR_MIGRATE_NON_SHARED_DISK";
const NON_SHARED_INC: &str = "VIR_MIGRATE_NON_SHARED_INC";
const TLS: &str = "VIR_MIGRATE_TLS";
const PARALLEL: &str = "VIR_MIGRATE_PARALLEL";
const ZEROCOPY: &str = "VIR_MIGRATE_ZEROCOPY";

const NEEDED: [&str; 2] = [LIVE, PEER2PEER];
const EXCLUDED: [(&str, &str); 3] = [
    (TUNNELLED, PARALLEL),
    (ZEROCOPY, TLS),
    (NON_SHARED_DISK, NON_SHARED_INC),
];

fn bit(name: &str) -> Option<u32> {
    FLAGS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|&(_, bit)| bit)
}

impl TryFrom<String> for MigrateFlag {
    type Error = MigrateFlagsError;

    fn try_from(name: String) -> Result<Self, MigrateFlagsError> {
        bit(&name)
            .map(Self)
            .ok_or(MigrateFlagsError::Unusable(name))
    }
}

impl MigrateFlag {
    /// Live migration from libvirtd to libvirtd; the domain's definition moves too.
    pub const DEFAULT: [Self; 4] = [
        Self(sys::VIR_MIGRATE_LIVE),
        Self(sys::VIR_MIGRATE_PEER2PEER),
        Self(sys::VIR_MIGRATE_PERSIST_DEST),
        Self(sys::VIR_MIGRATE_UNDEFINE_SOURCE),
    ];
}

impl MigrateFlags {
    /// Checks a combination of flags. `parallel` adds `VIR_MIGRATE_PARALLEL`.
    ///
    /// # Errors
    ///
    /// [`MigrateFlagsError`], except `Unusable`.
    pub fn new(flags: &[MigrateFlag], parallel: bool) -> Result<Self, MigrateFlagsError> {
        let parallel = if parallel {
            sys::VIR_MIGRATE_PARALLEL
        } else {
            0
        };
        let bits = flags.iter().fold(parallel, |bits, flag| bits | flag.0);
        let has = |name: &str| bit(name).is_some_and(|bit| bits & bit != 0);
        if let Some(name) = NEEDED.into_iter().find(|name| !has(name)) {
            return Err(MigrateFlagsError::Missing(name));
        }
        if let Some((one, other)) = EXCLUDED
            .into_iter()
            .find(|(one, other)| has(one) && has(other))
        {
            return Err(MigrateFlagsError::Excluded(one, other));
        }
        if has(ZEROCOPY) && !has(PARALLEL) {
            return Err(MigrateFlagsError::NeedsParallel(ZEROCOPY));
        }
        Ok(Self(bits))
    }

    /// Returns how these flags transport the copy of memory.
    pub fn carrier(self) -> Carrier {
        let carriers = [
            (sys::VIR_MIGRATE_TLS, Carrier::Tls),
            (sys::VIR_MIGRATE_TUNNELLED, Carrier::Tunnel),
            (sys::VIR_MIGRATE_ZEROCOPY, Carrier::Zerocopy),
        ];
        let set = carriers.into_iter().find(|(bit, _)| self.0 & bit != 0);
        set.map_or(Carrier::Plain, |(_, carrier)| carrier)
    }

    /// Adds `VIR_MIGRATE_TLS` if `tls` is true.
    pub(super) fn encrypted(self, tls: bool) -> Self {
        let tls = if tls { sys::VIR_MIGRATE_TLS } else { 0 };
        Self(self.0 | tls)
    }

    /// Returns the flags as libvirt's number.
    pub(super) fn bits(self) -> u32 {
        self.0
    }
}

impl Default for MigrateFlags {
    /// Returns the flags of [`MigrateFlag::DEFAULT`].
    fn default() -> Self {
        Self(
            MigrateFlag::DEFAULT
                .iter()
                .fold(0, |bits, flag| bits | flag.0),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(names: &[&str], parallel: bool) -> Result<MigrateFlags, MigrateFlagsError> {
        let flags: Result<Vec<_>, _> = names
            .iter()
            .map(|name| MigrateFlag::try_from((*name).to_owned()))
            .collect();
        MigrateFlags::new(&flags?, parallel)
    }

    #[test]
    fn flags_are_read_by_libvirts_names() {
        let names = [
            LIVE,
            PEER2PEER,
            "VIR_MIGRATE_PERSIST_DEST",
            "VIR_MIGRATE_UNDEFINE_SOURCE",
        ];
        assert_eq!(flags(&names, false), Ok(MigrateFlags::default()));
    }

    #[test]
    fn parallel_connections_set_their_flag() {
        let default = MigrateFlags::new(&MigrateFlag::DEFAULT, true).unwrap();
        assert_ne!(default.bits() & sys::VIR_MIGRATE_PARALLEL, 0);
    }

    #[test]
    fn flags_say_how_memory_is_copied() {
        let carrier = |name: &str| flags(&[LIVE, PEER2PEER, name], true).unwrap().carrier();
        assert_eq!(carrier(PEER2PEER), Carrier::Plain);
        assert_eq!(carrier(TLS), Carrier::Tls);
        assert_eq!(carrier(ZEROCOPY), Carrier::Zerocopy);
        let tunnelled = flags(&[LIVE, PEER2PEER, TUNNELLED], false).unwrap();
        assert_eq!(tunnelled.carrier(), Carrier::Tunnel);
        let encrypted = MigrateFlags::default().encrypted(true);
        assert_eq!(encrypted.carrier(), Carrier::Tls);
        assert_eq!(
            MigrateFlags::default().encrypted(false),
            MigrateFlags::default()
        );
    }

    #[test]
    fn flags_that_cannot_be_used_are_named() {
        let error = |names: &[&str]| flags(names, false).unwrap_err();
        for name in ["VIR_MIGRATE_FAST", "VIR_MIGRATE_OFFLINE", ""] {
            assert_eq!(
                error(&[LIVE, PEER2PEER, name]),
                MigrateFlagsError::Unusable(name.to_owned())
            );
        }
        assert_eq!(error(&[LIVE]), MigrateFlagsError::Missing(PEER2PEER));
        assert_eq!(
            error(&[LIVE, PEER2PEER, TUNNELLED, PARALLEL]),
            MigrateFlagsError::Excluded(TUNNELLED, PARALLEL)
        );
        assert_eq!(
            error(&[LIVE, PEER2PEER, ZEROCOPY]),
            MigrateFlagsError::NeedsParallel(ZEROCOPY)
        );
    }
}
