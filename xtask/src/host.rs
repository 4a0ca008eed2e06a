//! `cargo xtask host`: runs a command on a stock Debian kernel, in an emulated machine.

mod terminal;

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use lab::machine::wire::FromMachine;
use lab::machine::{self, Command, Machine};

use self::terminal::Terminal;
use crate::run::build;
use crate::setup;

/// Memory of the machine: enough for two VM hosts with a guest each, and for written files.
pub(crate) const MEMORY_MIB: u32 = 4096;

/// Arguments of `cargo xtask host`.
#[derive(Debug, Args)]
pub(crate) struct HostArgs {
    /// Kernel: a version or its beginning, such as 6.1 or 6.12 (the newest matching generic kernel
    /// of Debian is used), or the name of a package.
    kernel: String,
    /// Processors; with more than one, KVM in the machine is not reliable.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: u32,
    /// Memory of the machine, MiB.
    #[arg(long, value_name = "MIB", default_value_t = MEMORY_MIB, value_parser = clap::value_parser!(u32).range(512..=262_144))]
    memory: u32,
    /// Time after which the machine is killed, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    /// Directory in which the command may write files, available as $ROAMCAST_MACHINE_OUTPUT. All
    /// other files that the command writes disappear with the machine.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Program and arguments, run in the working directory of this command [default: a shell].
    #[arg(last = true)]
    command: Vec<String>,
}

/// Runs the command and returns its exit code.
///
/// # Errors
///
/// The machine does not start, exceeds the time limit, or ends before the command.
pub(crate) fn run(arguments: HostArgs) -> Result<ExitCode> {
    let is_interactive = arguments.command.is_empty();
    if is_interactive && !std::io::stdin().is_terminal() {
        bail!(
            "There is no command, and standard input is no terminal for a shell: give the command \
             after --, as in `cargo xtask host {} -- uname -r`",
            arguments.kernel
        );
    }
    // The machine cannot build; the command finds everything built.
    setup::ensure()?;
    build()?;
    let machine = Machine {
        kernel: arguments.kernel,
        cpus: arguments.cpus,
        memory_mib: arguments.memory,
        timeout: Duration::from_secs(arguments.timeout),
        output: arguments
            .output
            .as_deref()
            .map(machine::run::prepare_output)
            .transpose()?,
    };
    let mut command = Command {
        words: arguments.command,
        directory: std::env::current_dir().context("Failed to find the working directory")?,
        environment: machine::environment(),
        terminal: None,
    };
    if !is_interactive {
        return machine.run(&command, None, show).map(ExitCode::from);
    }
    command.words = vec!["bash".to_owned()];
    let terminal = Terminal::take()?;
    command.terminal = Some(terminal.size());
    let code = machine.run(&command, Some(terminal.keyboard()), show);
    drop(terminal);
    code.map(ExitCode::from)
}

/// Writes output of the machine to the stream that the command used.
pub(crate) fn show(message: FromMachine) -> Result<()> {
    match message {
        FromMachine::Output(bytes) => {
            let mut stdout = std::io::stdout().lock();
            stdout
                .write_all(&bytes)
                .and_then(|()| stdout.flush())
                .context("Failed to write to standard output")?;
        }
        FromMachine::Errors(bytes) => {
            // The stream may be closed; the command continues.
            let _ = std::io::stderr().write_all(&bytes);
        }
        FromMachine::Notice(text) => eprintln!("machine: {text}"),
        FromMachine::Started | FromMachine::Exit(_) => {}
    }
    Ok(())
}
