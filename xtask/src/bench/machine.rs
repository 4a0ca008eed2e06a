//! Runs a bench of migrations on a stock kernel: the same command, inside a host machine.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use lab::machine::wire::FromMachine;
use lab::machine::{self, Command, Machine};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use crate::host::{MEMORY_MIB, show};
use crate::run::go_on_delivered;

/// Time limit until the machine and the lab in it are ready.
const BOOT: Duration = Duration::from_secs(30 * 60);
/// Time limit of one migration in the machine.
const MOVE: Duration = Duration::from_secs(3 * 60);
/// File name of the report in the machine's output.
const REPORT: &str = "report.json";
/// Runs its arguments in the machine and puts the report into the machine's output.
const SCRIPT: &str = r#"exec "$@" --report "$ROAMCAST_MACHINE_OUTPUT/report.json""#;

/// Place of a bench: this machine or a host machine.
#[derive(Clone, Debug, Args)]
pub(super) struct Place {
    /// Run in a machine with this stock kernel (named as for `cargo xtask host`), with KVM and
    /// vhost-net
    #[arg(long, value_name = "KERNEL")]
    host: Option<String>,
}

impl Place {
    /// Runs this command in the machine if the options ask for it. Returns the report, which is
    /// displayed like a report of this machine.
    ///
    /// # Errors
    ///
    /// The machine does not start, or the bench ends without a report.
    pub(super) fn run_there<R: DeserializeOwned>(&self, moves: u64) -> Result<Option<R>> {
        let Some(kernel) = &self.host else {
            return Ok(None);
        };
        // The machine boots the programs beside this one, and runs this one.
        go_on_delivered()?;
        let output = TempDir::new().context("Failed to create a directory for the report")?;
        let machine = Machine {
            kernel: kernel.clone(),
            cpus: 1,
            memory_mib: MEMORY_MIB,
            timeout: BOOT + MOVE * u32::try_from(moves).unwrap_or(u32::MAX),
            output: Some(machine::run::prepare_output(output.path())?),
        };
        let mut words = ["sh", "-c", SCRIPT, "bench"].map(str::to_owned).to_vec();
        words.push(program()?);
        words.extend(without_place(std::env::args().skip(1)));
        let command = Command {
            words,
            directory: std::env::current_dir().context("Failed to find the working directory")?,
            environment: machine::environment(),
            terminal: None,
        };
        let code = machine.run(&command, None, |message| match message {
            FromMachine::Output(_) => Ok(()),
            other => show(other),
        })?;
        let report = fs::read_to_string(output.path().join(REPORT)).with_context(|| {
            format!("The bench on kernel {kernel} ended with exit code {code} and left no report")
        })?;
        let report = serde_json::from_str(&report).context("The report cannot be read")?;
        Ok(Some(report))
    }
}

fn program() -> Result<String> {
    let program = std::env::current_exe().context("Failed to find this program's own path")?;
    let program = program.into_os_string().into_string();
    program.map_err(|path| anyhow!("{} is no UTF-8", path.display()))
}

/// Removes the options for the place and the report from the arguments.
fn without_place(arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    const LEFT_OUT: [&str; 2] = ["--host", "--report"];
    let mut words = Vec::new();
    let mut arguments = arguments.into_iter();
    while let Some(word) = arguments.next() {
        let (name, value) = word.split_once('=').unzip();
        if !LEFT_OUT.contains(&name.unwrap_or(&word)) {
            words.push(word);
        } else if value.is_none() {
            arguments.next();
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use lab::machine::OUTPUT_VARIABLE;

    use super::*;

    #[test]
    fn place_and_report_are_left_out_with_their_values() {
        let typed = "bench handover --host 6.12 --moves 2 --report=x --host=6.1 --json";
        let typed = typed.split(' ').map(str::to_owned);
        assert_eq!(
            without_place(typed),
            ["bench", "handover", "--moves", "2", "--json"]
        );
    }

    #[test]
    fn script_has_the_report_where_it_comes_back_from() {
        assert!(SCRIPT.ends_with(&format!("\"${OUTPUT_VARIABLE}/{REPORT}\"")));
    }
}
