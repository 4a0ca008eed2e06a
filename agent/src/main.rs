//! `roamcast`: the agent of a VM host, the other roles, and the operator's commands.

use std::process::ExitCode;

use clap::Parser;
use roamcast::allocator;
use roamcast::cli::{Cli, PkiCommand, Roles};
use roamcast::config::{Config, ImsConfig, McsConfig, RelayConfig};
use roamcast::pki::{self, IssueRequest, Validity};
use roamcast::runtime;
use tokio::runtime::Runtime;

fn main() -> ExitCode {
    allocator::return_large_blocks();
    Cli::parse().run(&Program)
}

struct Program;

impl Roles for Program {
    fn agent(&self, config: Config) -> anyhow::Result<()> {
        Ok(Runtime::new()?.block_on(runtime::run(config))?)
    }

    fn relay(&self, config: RelayConfig) -> anyhow::Result<()> {
        Ok(Runtime::new()?.block_on(runtime::relay::run(config))?)
    }

    fn mcs(&self, config: McsConfig) -> anyhow::Result<()> {
        Ok(Runtime::new()?.block_on(runtime::mcs::run(config))?)
    }

    fn ims(&self, config: ImsConfig) -> anyhow::Result<()> {
        Ok(Runtime::new()?.block_on(runtime::ims::run(config))?)
    }

    fn pki(&self, command: PkiCommand) -> anyhow::Result<()> {
        run_pki(command)
    }
}

fn run_pki(command: PkiCommand) -> anyhow::Result<()> {
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
    print!("{next_steps}");
    Ok(())
}
