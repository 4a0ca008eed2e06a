//! `roamcast pki`: makes, renews and revokes the certificates of agents, relays and servers.

use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::Subcommand;

use crate::pki::{self, IssueRequest, Validity};
use crate::role::Role;

/// Subcommands of `roamcast pki`.
#[derive(Clone, Debug, Subcommand)]
pub enum PkiCommand {
    /// Make three small CAs, for the signalling, for libvirt and for QEMU; or only QEMU's CA if
    /// just that one is missing.
    Init {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name of the CAs; each CA adds its purpose.
        #[arg(long, default_value = "Roamcast CA")]
        name: String,
        /// Validity of the CAs, days.
        #[arg(long, default_value_t = pki::CA_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Issue certificates for one host: for its role in the signalling, and for role agent also for
    /// its libvirtd and QEMU.
    Issue {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name of the agent, relay or migration control server.
        name: String,
        /// Role in the signalling.
        #[arg(long, value_enum, default_value_t = Role::Agent)]
        role: Role,
        /// Address of the host; may be repeated.
        #[arg(long = "address", value_name = "ADDRESS")]
        addresses: Vec<IpAddr>,
        /// Validity of the certificates, days.
        #[arg(long, default_value_t = pki::CERTIFICATE_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Replace expiring certificates by new ones with new keys.
    Renew {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name of existing certificates.
        name: String,
        /// Validity of the new certificates, days.
        #[arg(long, default_value_t = pki::CERTIFICATE_DAYS, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Revoke the certificates of one host, relay or server.
    Revoke {
        /// Directory of the CAs.
        directory: PathBuf,
        /// Name of existing certificates.
        name: String,
    },
}

/// Runs a subcommand of `roamcast pki` and prints the next steps.
pub(super) fn run(command: PkiCommand, out: &mut impl Write) -> anyhow::Result<()> {
    let next_steps = match command {
        PkiCommand::Init {
            directory,
            name,
            days,
        } => pki::init(&directory, &name, Validity::days(days))?.next_steps(),
        PkiCommand::Issue {
            directory,
            name,
            role,
            addresses,
            days,
        } => {
            let validity = Validity::days(days);
            pki::issue(
                &directory,
                &IssueRequest {
                    name,
                    role,
                    addresses,
                    validity,
                },
            )?
            .next_steps()
        }
        PkiCommand::Renew {
            directory,
            name,
            days,
        } => pki::renew(&directory, &name, Validity::days(days))?.next_steps(),
        PkiCommand::Revoke { directory, name } => pki::revoke(&directory, &name)?.next_steps(),
    };
    write!(out, "{next_steps}")?;
    Ok(())
}
