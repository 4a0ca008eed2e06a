//! `cargo xtask test`: everything that must hold before a change lands, cheapest first.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::run::{Tally, build, cargo, step, tests, workspace};
use crate::setup;

/// How far to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Level {
    /// Format, lints, documentation.
    Lint,
    /// Unit and simulation tests; nothing is needed.
    Unit,
    /// Kernel programs by test-run; needs root.
    Program,
    /// Namespaces with real kernel listeners, bridges and routers; needs root.
    Network,
    /// Real virtual machines and migrations; needs root.
    Vm,
}

/// Arguments of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Only this level [default: all of them].
    #[arg(value_enum)]
    level: Option<Level>,
}

/// Test targets of the `tests` package by level.
const PROGRAM: &[&str] = &[
    "prog_test_run",
    "parity",
    "relay_programs",
    "gate_programs",
    "gate_races",
    "mat_programs",
    "forward_programs",
];
const NETWORK: &[&str] = &[
    "snoop",
    "gate",
    "gate_probes",
    "membership",
    "tap_queue",
    "restart",
    "relay_path",
    "relay_server",
    "bench_smoke",
    "peers",
    "ims",
    "mat_path",
    "forwarding",
    "lab_network",
    "lab_hosts",
    "lab_removal",
];
const VM: &[&str] = &[
    "guest",
    "migration",
    "handover",
    "hook",
    "queries",
    "refusals",
    "failures",
    "relay",
    "streams",
    "mobility",
];

/// Runs the tests and prints the sum of their results as the last line.
pub(crate) fn run(args: &TestArgs) -> Result<()> {
    setup::ensure()?;
    let mut tally = Tally::default();
    let outcome = levels(args.level, &mut tally);
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.ignored
    );
    outcome
}

fn levels(only: Option<Level>, tally: &mut Tally) -> Result<()> {
    let wanted = |level| only.is_none_or(|only| only == level);
    if wanted(Level::Lint) {
        lint()?;
    }
    if wanted(Level::Unit) {
        let mut command = workspace("test");
        tests(
            "unit and simulation tests",
            command.args(["--lib", "--bins"]),
            tally,
        )?;
    }
    for (level, targets) in [
        (Level::Program, PROGRAM),
        (Level::Network, NETWORK),
        (Level::Vm, VM),
    ] {
        if !wanted(level) {
            continue;
        }
        if level >= Level::Network {
            build()?;
        }
        for target in targets {
            // One after the other: the tests of a target share the machine's two cores with the
            // guests they start.
            let mut command = workspace("test");
            command.args(["--test", target, "--", "--test-threads", "1"]);
            tests(target, &mut command, tally)?;
        }
    }
    if tally.failed > 0 {
        bail!("{} tests failed", tally.failed);
    }
    Ok(())
}

/// `cargo xtask lint`: format, clippy, rustdoc.
pub(crate) fn lint() -> Result<()> {
    step("format", &mut cargo(["fmt", "--all", "--check"]))?;
    step(
        "clippy",
        workspace("clippy").args(["--all-targets", "--", "-D", "warnings"]),
    )?;
    // Apart from the rest: features of the workspace must not reach the kernel programs.
    step(
        "clippy of the kernel programs",
        cargo(["clippy", "-p", "agent-ebpf"]).args(["--", "-D", "warnings"]),
    )?;
    let mut doc = workspace("doc");
    doc.args(["--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings");
    step("rustdoc", &mut doc)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_of_one_level() {
        let manifest = include_str!("../../tests/Cargo.toml");
        let mut known: Vec<_> = [PROGRAM, NETWORK, VM].concat();
        for section in manifest.split("\n[[test]]\nname = \"").skip(1) {
            let name = section.split('"').next().unwrap();
            let at = known.iter().position(|it| *it == name);
            known.swap_remove(at.unwrap_or_else(|| panic!("{name} runs at no level")));
        }
        assert!(known.is_empty(), "no such targets: {known:?}");
    }
}
