//! Encryption of the copy of a VM's memory.
//!
//! ```text
//! flags of the migration       libvirt.encrypt   certificates of QEMU     the copy goes
//! VIR_MIGRATE_TLS              any                                        by TLS
//! VIR_MIGRATE_TUNNELLED        any                                        in libvirt's connection
//! VIR_MIGRATE_ZEROCOPY         auto, never                                in the clear
//! none of these                auto, always      at both ends             by TLS
//!                              auto              not at both              in the clear
//!                              always            not at both              not at all: the move is refused
//!                              never                                      in the clear
//! ```
//!
//! A copy that started with TLS never continues without TLS: a TLS failure ends the migration.

use std::path::PathBuf;

use serde::Deserialize;

use super::context::Context;
use super::refusal::Refusal;

/// Condition for encryption of the copy (`libvirt.encrypt`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encrypt {
    /// Encrypt if both ends can.
    #[default]
    Auto,
    /// Encrypt, or refuse the migration.
    Always,
    /// Encrypt only if the migration flags demand TLS.
    Never,
}

/// Transport of the copy according to the migration flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Carrier {
    /// QEMU's own connection, unencrypted unless TLS is requested.
    #[default]
    Plain,
    /// QEMU's own connection with TLS.
    Tls,
    /// libvirt's connection, with the protection of the connection's URI.
    Tunnel,
    /// QEMU's own connection with zero copy, which is incompatible with TLS.
    Zerocopy,
}

/// Reason why QEMU cannot encrypt a copy on this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
pub enum NoCopyTls {
    /// The certificates have not been checked yet.
    #[default]
    #[error("QEMU's certificates have not been looked for yet")]
    Unknown,
    /// A file is missing.
    #[error("{} is missing", .0.display())]
    Missing(PathBuf),
    /// QEMU cannot read a file.
    #[error("the user that VMs run as cannot read {}", .0.display())]
    Unreadable(PathBuf),
}

/// Whether QEMU can encrypt the copies of departing and arriving VMs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyTls {
    /// For departing VMs.
    pub client: Result<(), NoCopyTls>,
    /// For arriving VMs.
    pub server: Result<(), NoCopyTls>,
}

impl Default for CopyTls {
    fn default() -> Self {
        Self {
            client: Err(NoCopyTls::Unknown),
            server: Err(NoCopyTls::Unknown),
        }
    }
}

/// Reason why a copy is unencrypted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InTheClear {
    /// The configuration disables encryption.
    #[error("libvirt.encrypt is \"never\"")]
    Never,
    /// The configuration has a flag that is incompatible with TLS.
    #[error("VIR_MIGRATE_ZEROCOPY does not go with TLS")]
    Zerocopy,
    /// The source host cannot encrypt.
    #[error("on {agent} {why}")]
    Source {
        /// Name of the source host's agent.
        agent: String,
        /// Obstacle on the source host.
        why: NoCopyTls,
    },
    /// The destination host cannot decrypt, or does not say.
    #[error(
        "{agent} has no certificate for it that QEMU can read; `roamcast status` says there why"
    )]
    Destination {
        /// Name of the destination host's agent.
        agent: String,
    },
}

/// Protection of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyWay {
    /// QEMU encrypts the copy.
    Tls,
    /// libvirt carries the copy in its own connection.
    Tunnel,
    /// The copy is readable for everybody between the hosts.
    Clear(InTheClear),
}

/// Configuration of copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyConfig {
    /// Condition for encryption.
    pub encrypt: Encrypt,
    /// Transport according to the migration flags.
    pub carrier: Carrier,
}

impl CopyConfig {
    /// Returns true if QEMU's certificates decide the protection of a copy.
    pub fn is_by_certificates(self) -> bool {
        self.carrier == Carrier::Plain && self.encrypt != Encrypt::Never
    }

    /// Returns the protection of a copy between two agents, from their abilities to encrypt.
    fn way(self, (source, here): (&str, &CopyTls), (destination, there): (&str, bool)) -> CopyWay {
        match self.carrier {
            Carrier::Tls => CopyWay::Tls,
            Carrier::Tunnel => CopyWay::Tunnel,
            Carrier::Zerocopy => CopyWay::Clear(InTheClear::Zerocopy),
            Carrier::Plain if !self.is_by_certificates() => CopyWay::Clear(InTheClear::Never),
            Carrier::Plain => match &here.client {
                Err(why) => CopyWay::Clear(InTheClear::Source {
                    agent: source.to_owned(),
                    why: why.clone(),
                }),
                Ok(()) if !there => CopyWay::Clear(InTheClear::Destination {
                    agent: destination.to_owned(),
                }),
                Ok(()) => CopyWay::Tls,
            },
        }
    }
}

impl Context {
    /// Returns the protection of a domain's copy to a destination host; `there` tells whether that host
    /// can decrypt.
    pub(super) fn copy_way(&self, destination: &str, there: bool) -> Result<CopyWay, Refusal> {
        let here = (self.config.name.as_str(), &self.copy_tls);
        let way = self.config.copy.way(here, (destination, there));
        match (way, self.config.copy.encrypt) {
            (CopyWay::Clear(why), Encrypt::Always) => Err(Refusal::InTheClear {
                destination: destination.to_owned(),
                why,
            }),
            (way, _) => Ok(way),
        }
    }
}

#[cfg(test)]
mod tests;
