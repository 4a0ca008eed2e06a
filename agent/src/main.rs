//! `roamcast`: the agent of a VM host, and the operator's commands.

use std::process::ExitCode;

use clap::Parser;
use roamcast::cli::{Cli, PkiCommand};
use roamcast::config::{Config, RelayConfig};
use roamcast::pki::{self, IssueRequest, Validity};
use roamcast::runtime;

fn main() -> ExitCode {
    Cli::parse().run(run_agent, run_relay, run_pki)
}

fn run_agent(config: Config) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(runtime::run(config))?;
    Ok(())
}

fn run_relay(config: RelayConfig) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(runtime::relay::run(config))?;
    Ok(())
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
            addresses,
            days,
        } => {
            let validity = Validity::days(days);
            pki::issue(
                &directory,
                &IssueRequest {
                    name,
                    addresses,
                    validity,
                },
            )?
            .next_steps()
        }
    };
    print!("{next_steps}");
    Ok(())
}
