//! Runs tests on stock kernels: builds the test programs, and runs their modules one after the other
//! in one host machine per kernel.

use std::panic::resume_unwind;
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::machine::wire::FromMachine;
use lab::machine::{self, Machine};

use super::Selection;
use super::levels::{Level, NOT_ON_HOST, QUICK, VM_ON_HOST};
use super::programs::{self, PACKAGE_VARIABLE, Run, package};
use super::report::Report;
use super::results::Tally;
use crate::host::{self, MEMORY_MIB};
use crate::run::build;

/// Script that runs the programs in the machine.
const SCRIPT: &str = include_str!("run-tests.sh");

/// Time limits.
struct Limits {
    /// Limit of one module in the machine.
    module: Duration,
    /// Limit of the whole machine.
    machine: Duration,
}

const WHOLE: Limits = Limits {
    module: Duration::from_secs(30 * 60),
    machine: Duration::from_secs(90 * 60),
};

/// Limits of a quick run: a module that hangs must leave time for the others.
const QUICK_LIMITS: Limits = Limits {
    module: Duration::from_secs(12 * 60),
    machine: Duration::from_secs(25 * 60),
};

/// Tests to run on a kernel.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part<'a> {
    /// The tests that CI runs.
    Quick,
    /// Tests by name; without names, the tests of the levels that run on a stock kernel.
    Selected(&'a Selection),
}

/// Runs tests on all kernels at the same time. Prints their output, the skipped tests with reasons,
/// and the time. Each machine has one processor, so several machines use several processors of this
/// machine.
///
/// # Errors
///
/// A test fails or hangs, a module runs no test, or the machine fails.
pub(super) fn run(kernels: &[&str], part: Part<'_>, tally: &mut Tally) -> Result<()> {
    build()?;
    let runs = choose(part)?;
    let outcomes: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = kernels
            .iter()
            .map(|kernel| scope.spawn(|| run_on(kernel, part, &runs, kernels.len() > 1)))
            .collect();
        threads.into_iter().map(ScopedJoinHandle::join).collect()
    });
    let mut failed = Vec::new();
    for outcome in outcomes {
        let (results, outcome) = outcome.unwrap_or_else(|panic| resume_unwind(panic));
        tally.add(results);
        failed.extend(outcome.err());
    }
    let mut failed = failed.into_iter();
    let Some(mut first) = failed.next() else {
        return Ok(());
    };
    for other in failed {
        first = first.context(other);
    }
    Err(first)
}

/// Runs tests on one kernel. If `named` is true, each line begins with the kernel's version.
fn run_on(kernel: &str, part: Part<'_>, runs: &[Run], named: bool) -> (Tally, Result<()>) {
    let mut report = Report::default();
    let outcome = report_on(kernel, part, runs, named, &mut report);
    (report.tally, outcome)
}

fn report_on(
    kernel: &str,
    part: Part<'_>,
    runs: &[Run],
    named: bool,
    report: &mut Report,
) -> Result<()> {
    eprintln!("==> {} modules of tests on kernel {kernel}", runs.len());
    let prefix = if named {
        format!("{kernel} | ")
    } else {
        String::new()
    };
    let started = Instant::now();
    let limits = match part {
        Part::Quick => QUICK_LIMITS,
        Part::Selected(_) => WHOLE,
    };
    let machine = Machine {
        kernel: kernel.to_owned(),
        cpus: 1,
        memory_mib: MEMORY_MIB,
        timeout: limits.machine,
        output: None,
    };
    let mut printed = Vec::new();
    let outcome = machine.run(&command(runs, limits.module), None, |message| {
        let FromMachine::Output(bytes) = message else {
            return host::show(message);
        };
        printed.extend_from_slice(&bytes);
        while let Some(end) = printed.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = printed.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let line = line.trim_end_matches(['\n', '\r']);
            if report.read(line) {
                println!("{prefix}{line}");
            }
        }
        Ok(())
    });
    report.close(runs.iter().map(|run| run.module.as_str()));
    report.print(kernel, started.elapsed());
    outcome?;
    ensure!(
        report.failures.is_empty(),
        "On kernel {kernel}: {}",
        report.failures.join("; ")
    );
    Ok(())
}

fn command(runs: &[Run], deadline: Duration) -> machine::Command {
    let mut words: Vec<String> = ["bash", "-c", SCRIPT, "run-tests"]
        .map(str::to_owned)
        .to_vec();
    words.push(deadline.as_secs().to_string());
    for run in runs {
        words.push(run.module.clone());
        words.push(run.program.display().to_string());
        words.push(run.tests.len().to_string());
        words.extend(run.tests.iter().cloned());
    }
    // The same environment as cargo gives a test program.
    let mut environment = machine::environment();
    environment.retain(|(name, _)| name != PACKAGE_VARIABLE);
    environment.push((PACKAGE_VARIABLE.to_owned(), package().display().to_string()));
    machine::Command {
        words,
        directory: package(),
        environment,
        terminal: None,
    }
}

fn choose(part: Part<'_>) -> Result<Vec<Run>> {
    let selection = match part {
        Part::Quick => return programs::named(&programs::built()?, QUICK),
        Part::Selected(selection) => selection,
    };
    let selected = selection.programs()?;
    if !selection.names.is_empty() {
        return programs::named(&selected, &selection.names);
    }
    let mut runs = Vec::new();
    for program in &selected {
        if program.level == Level::Vm {
            runs.extend(programs::named(&selected, VM_ON_HOST)?);
            continue;
        }
        let can_run = |run: &Run| !NOT_ON_HOST.contains(&run.module.as_str());
        runs.extend(program.runs().into_iter().filter(can_run));
    }
    Ok(runs)
}
