//! `cargo xtask test`: all checks and tests that a change must pass, cheapest first.
//!
//! - [`levels`](mod@levels) says which tests run where.
//! - [`host`] runs tests on a stock kernel.
//! - [`results`] reads the output of test programs; [`report`] collects it for a kernel.

mod host;
mod levels;
mod report;
mod results;

use anyhow::{Context, Result, bail};
use clap::Args;

use self::host::Part;
use self::levels::{KERNELS, Level, TARGETS};
use self::results::{Tally, tests};
use crate::run::{build, workspace};
use crate::{fuzz, lint, setup};

/// Arguments of `cargo xtask test`.
#[derive(Debug, Args)]
pub(crate) struct TestArgs {
    /// Level to run [default: all levels].
    #[arg(value_enum)]
    level: Option<Level>,
    /// Run the levels program and network, and one test of each kind of the level vm, in a machine
    /// with this stock kernel: a version or its beginning, such as 6.1, or the name of a package.
    #[arg(long, value_name = "KERNEL")]
    host: Option<String>,
    /// With --host: run only what CI runs; takes about 15 minutes.
    #[arg(long, requires = "host", conflicts_with = "level")]
    quick: bool,
    /// With --host: run only this target or test, of any level; may be given several times.
    #[arg(long, value_name = "NAME", requires = "host", conflicts_with_all = ["level", "quick"])]
    test: Vec<String>,
}

/// Runs the tests and prints the sum of their results as the last line.
pub(crate) fn run(args: &TestArgs) -> Result<()> {
    setup::ensure()?;
    let mut tally = Tally::default();
    let outcome = match &args.host {
        Some(kernel) => host::run(&[kernel], args.part(), &mut tally),
        None => levels(args.level, &mut tally),
    };
    println!(
        "{} passed, {} failed, {} skipped",
        tally.passed, tally.failed, tally.skipped
    );
    outcome
}

impl TestArgs {
    fn part(&self) -> Part<'_> {
        match (self.quick, self.test.as_slice()) {
            (true, _) => Part::Quick,
            (false, []) => Part::Level(self.level),
            (false, names) => Part::Named(names),
        }
    }
}

fn levels(only: Option<Level>, tally: &mut Tally) -> Result<()> {
    let wanted = |level| only.is_none_or(|only| only == level);
    if wanted(Level::Lint) {
        lint::run()?;
    }
    if wanted(Level::Unit) {
        let mut command = workspace("test");
        tests(
            "unit and simulation tests",
            command.args(["--lib", "--bins"]),
            tally,
        )?;
    }
    if wanted(Level::Fuzz) {
        fuzz::briefly()?;
    }
    for (level, targets) in TARGETS {
        if !wanted(level) {
            continue;
        }
        if level >= Level::Network {
            build()?;
        }
        for target in targets {
            // The tests run serially, because they share the machine's two cores with the guests
            // that they start.
            let mut command = workspace("test");
            command.args(["--test", target, "--", "--test-threads", "1"]);
            tests(target, &mut command, tally)?;
        }
    }
    if wanted(Level::Host) {
        host::run(&KERNELS, Part::Quick, tally).context(
            "The quick part failed; `cargo xtask test --host KERNEL --quick` runs it alone",
        )?;
    }
    if tally.failed > 0 {
        bail!("{} tests failed", tally.failed);
    }
    Ok(())
}
