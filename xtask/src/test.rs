//! `cargo xtask test`: all checks and tests that a change must pass, cheapest first; or some levels,
//! modules and tests of them.
//!
//! - [`levels`](mod@levels) says what the levels are, and which tests run on a stock kernel.
//! - [`programs`] builds the test programs, finds tests by name, and runs modules.
//! - [`host`] runs tests on a stock kernel.
//! - [`results`] reads the output of test programs; [`report`] collects it for a kernel.

mod host;
mod levels;
mod programs;
mod report;
mod results;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use self::host::Part;
use self::levels::{KERNELS, Level, PROGRAMS};
use self::programs::{Program, Run};
use self::results::{Tally, tests};
use crate::run::{build, step, workspace};
use crate::{fuzz, lint, setup};

/// Arguments of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Levels (lint, unit, fuzz, program, network, vm, host), or modules and tests by name, such as
    /// snoop or gate::held_frames_do_not_come_out [default: all levels].
    ///
    /// A name is the path of a module or test, its end, or a part of it. After a level it means a
    /// test of that level; alone, a test of program, network or vm.
    #[arg(value_name = "LEVEL|NAME")]
    wanted: Vec<String>,
    /// List the tests instead of running them.
    #[arg(long, conflicts_with_all = ["host", "quick", "test"])]
    list: bool,
    /// Run the levels program and network, and one test of each kind of the level vm, in a machine
    /// with this stock kernel: a version or its beginning, such as 6.1, or the name of a package.
    #[arg(long, value_name = "KERNEL")]
    host: Option<String>,
    /// With --host: run only what CI runs; takes about 15 minutes.
    #[arg(long, requires = "host", conflicts_with = "wanted")]
    quick: bool,
    /// With --host: run only this module or test, of any level; may be given several times.
    #[arg(long, value_name = "NAME", requires = "host", conflicts_with_all = ["wanted", "quick"])]
    test: Vec<String>,
}

/// Selected tests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Selection {
    /// Levels; empty: all.
    levels: Vec<Level>,
    /// Names of modules and tests within the levels; empty: all.
    names: Vec<String>,
}

impl Selection {
    /// Reads the words of the command line: those that are levels, and names.
    fn new(words: &[String]) -> Self {
        let mut selection = Self::default();
        for word in words {
            match Level::from_str(word, false) {
                Ok(level) => selection.levels.push(level),
                Err(_) => selection.names.push(word.clone()),
            }
        }
        selection
    }

    fn has(&self, level: Level) -> bool {
        self.levels.is_empty() || self.levels.contains(&level)
    }

    /// Returns true if names are to be found among the unit tests, which only cargo knows.
    fn is_of_unit_tests(&self) -> bool {
        self.levels == [Level::Unit]
    }

    /// Builds and returns the selected programs.
    ///
    /// # Errors
    ///
    /// A level among the selected ones has no program, or as for [`programs::built`].
    fn programs(&self) -> Result<Vec<Program>> {
        let has_program = |level: &Level| PROGRAMS.iter().any(|(of, _)| of == level);
        ensure!(
            self.levels.iter().all(has_program),
            "Take program, network or vm: no other level has a test program"
        );
        let programs = programs::built()?.into_iter();
        Ok(programs.filter(|it| self.has(it.level)).collect())
    }
}

/// Runs the tests and prints the sum of their results as the last line.
pub(crate) fn run(args: &TestArgs) -> Result<()> {
    setup::ensure()?;
    let mut selection = Selection::new(&args.wanted);
    if args.list {
        return list(&selection);
    }
    selection.names.extend(args.test.iter().cloned());
    let mut tally = Tally::default();
    let outcome = match &args.host {
        Some(kernel) if args.quick => host::run(&[kernel], Part::Quick, &mut tally),
        Some(kernel) => host::run(&[kernel], Part::Selected(&selection), &mut tally),
        None if selection.names.is_empty() => levels(&selection, &mut tally),
        None if selection.is_of_unit_tests() => unit(&selection.names, &mut tally),
        None => named(&selection, &mut tally),
    };
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    outcome
}

/// Prints the paths of tests.
fn list(selection: &Selection) -> Result<()> {
    if selection.is_of_unit_tests() {
        let mut command = workspace("test");
        command.args(["--lib", "--bins", "--", "--list"]);
        command.args(&selection.names);
        return step("unit and simulation tests", &mut command);
    }
    let programs = selection.programs()?;
    let runs = if selection.names.is_empty() {
        programs.iter().flat_map(Program::runs).collect()
    } else {
        programs::named(&programs, &selection.names)?
    };
    for test in runs.iter().flat_map(|run| &run.tests) {
        println!("{test}");
    }
    Ok(())
}

/// Runs all tests of the levels.
fn levels(selection: &Selection, tally: &mut Tally) -> Result<()> {
    if selection.has(Level::Lint) {
        lint::run()?;
    }
    if selection.has(Level::Unit) {
        unit(&[], tally)?;
    }
    if selection.has(Level::Fuzz) {
        fuzz::briefly()?;
    }
    if PROGRAMS.iter().any(|(level, _)| selection.has(*level)) {
        let programs = programs::built()?.into_iter();
        for program in programs.filter(|it| selection.has(it.level)) {
            modules(&program.runs(), tally)?;
        }
    }
    if selection.has(Level::Host) {
        host::run(&KERNELS, Part::Quick, tally).context(
            "The quick part failed; `cargo xtask test --host KERNEL --quick` runs it alone",
        )?;
    }
    judge(tally)
}

/// Runs unit and simulation tests, all or those whose paths contain one of the names.
fn unit(names: &[String], tally: &mut Tally) -> Result<()> {
    let mut command = workspace("test");
    command.args(["--lib", "--bins", "--"]).args(names);
    tests("unit and simulation tests", "unit", &mut command, tally)
}

/// Runs modules and tests by name.
fn named(selection: &Selection, tally: &mut Tally) -> Result<()> {
    let programs = selection.programs()?;
    let runs = programs::named(&programs, &selection.names)?;
    modules(&runs, tally)?;
    judge(tally)
}

/// Runs modules, each in a process of its own.
fn modules(runs: &[Run], tally: &mut Tally) -> Result<()> {
    if runs.iter().any(|run| run.level >= Level::Network) {
        build()?;
    }
    for run in runs {
        tests(&run.module, &run.module, &mut run.command(), tally)?;
    }
    Ok(())
}

fn judge(tally: &Tally) -> Result<()> {
    if tally.failed > 0 {
        bail!("{} tests failed", tally.failed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_names_are_told_apart() {
        let words = ["network", "gate", "units::relays"].map(str::to_owned);
        let selection = Selection::new(&words);
        assert_eq!(selection.levels, [Level::Network]);
        assert_eq!(selection.names, ["gate", "units::relays"]);
        assert!(selection.has(Level::Network) && !selection.has(Level::Vm));
        assert!(Selection::new(&[]).has(Level::Vm));
    }

    #[test]
    fn levels_without_tests_by_name_are_refused() {
        let selection = Selection::new(&["lint", "gate"].map(str::to_owned));
        assert!(selection.programs().is_err());
    }
}
