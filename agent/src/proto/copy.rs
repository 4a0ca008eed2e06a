//! How the copy of a VM's memory is kept from others on its way.
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
//! A copy that has begun by TLS never goes on without: what fails ends the move.

use std::path::PathBuf;

use serde::Deserialize;

use super::context::Context;
use super::refusal::Refusal;

/// When the copy is encrypted (`libvirt.encrypt`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Encrypt {
    /// Where both ends can.
    #[default]
    Auto,
    /// Or the VM does not move.
    Always,
    /// Not unless the flags say so.
    Never,
}

/// What the flags of a migration make of the copy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Carrier {
    /// A connection of QEMU's own, in the clear unless TLS is asked for.
    #[default]
    Plain,
    /// The same by TLS.
    Tls,
    /// libvirt's connection, which is what its URI says.
    Tunnel,
    /// A connection of QEMU's own that TLS does not go with.
    Zerocopy,
}

/// Why QEMU cannot encrypt a copy here.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
pub enum NoCopyTls {
    /// Nobody has looked yet.
    #[default]
    #[error("QEMU's certificates have not been looked for yet")]
    Unknown,
    /// A file is not there.
    #[error("{} is missing", .0.display())]
    Missing(PathBuf),
    /// QEMU cannot read a file.
    #[error("the user that VMs run as cannot read {}", .0.display())]
    Unreadable(PathBuf),
}

/// Whether QEMU can encrypt the copies of VMs that leave, and of VMs that come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopyTls {
    /// Of those that leave.
    pub client: Result<(), NoCopyTls>,
    /// Of those that come.
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

/// Why a copy goes in the clear.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InTheClear {
    /// The configuration says so.
    #[error("libvirt.encrypt is \"never\"")]
    Never,
    /// The configuration has a flag that TLS does not go with.
    #[error("VIR_MIGRATE_ZEROCOPY does not go with TLS")]
    Zerocopy,
    /// The source cannot.
    #[error("on {agent} {why}")]
    Source {
        /// Name of its agent.
        agent: String,
        /// Why it cannot.
        why: NoCopyTls,
    },
    /// The destination cannot, or does not say.
    #[error(
        "{agent} has no certificate for it that QEMU can read; `roamcast status` says there why"
    )]
    Destination {
        /// Name of its agent.
        agent: String,
    },
}

/// How a copy goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CopyWay {
    /// QEMU encrypts it.
    Tls,
    /// libvirt carries it in its own connection.
    Tunnel,
    /// Everybody between the hosts can read it.
    Clear(InTheClear),
}

/// What the configuration says of copies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyConfig {
    /// When they are encrypted.
    pub encrypt: Encrypt,
    /// What the flags make of them.
    pub carrier: Carrier,
}

impl CopyConfig {
    /// Whether certificates of QEMU decide how a copy goes.
    pub fn is_by_certificates(self) -> bool {
        self.carrier == Carrier::Plain && self.encrypt != Encrypt::Never
    }

    /// How a copy goes from an agent, which can or cannot encrypt it, to another one.
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
    /// How the copy of a domain goes to a destination that can or cannot decrypt it.
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
#[path = "tests/copy.rs"]
mod tests;
