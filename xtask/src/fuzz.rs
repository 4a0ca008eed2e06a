//! `cargo xtask fuzz`: runs libFuzzer over every parser of foreign bytes, and over the state
//! machines.
//!
//! The targets are functions of the crates under test (`common/src/fuzz.rs` and its siblings). The
//! programs that run them are in `tests/fuzz`. New inputs stay under `target/fuzz`, and the next
//! run starts with them. `--keep` copies a minimal set with the same coverage to
//! `tests/fuzz/corpus`; the unit tests run this set.
//!
//! A stable toolchain suffices: every rustc has the coverage passes, and safe Rust needs no
//! sanitizer.

mod target;

use std::collections::VecDeque;
use std::env::consts::ARCH;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use comfy_table::{Cell, CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};

use self::target::{Outcome, Start, Target};
use crate::run::{cargo, root, step};
use crate::setup;

/// Environment variable that names the target to a fuzz program.
const VARIABLE: &str = "ROAMCAST_FUZZ_TARGET";
/// Programs of `tests/fuzz`.
const PROGRAMS: [&str; 3] = ["common", "agent", "migkick"];
/// Time for fuzzing in `cargo xtask test`.
pub(crate) const A_MINUTE: Duration = Duration::from_secs(60);

/// Arguments of `cargo xtask fuzz`.
#[derive(Debug, Args)]
pub(crate) struct FuzzArgs {
    /// Targets [default: all].
    target: Vec<String>,
    /// Time for all targets together, minutes; each target gets the same share.
    #[arg(long, value_name = "N", default_value_t = 10.0)]
    minutes: f64,
    /// Print the results as JSON.
    #[arg(long)]
    json: bool,
    /// List the targets without running them.
    #[arg(long)]
    list: bool,
    /// After the run, copy new inputs to the source tree and remove the inputs that do not add
    /// coverage.
    #[arg(long)]
    keep: bool,
}

/// Runs `cargo xtask fuzz`.
///
/// # Errors
///
/// An assertion failed for an input, which the error names, or a build failed.
pub(crate) fn run(args: &FuzzArgs) -> Result<()> {
    ensure!(
        args.minutes.is_finite() && args.minutes > 0.0,
        "--minutes must be more than 0"
    );
    setup::ensure()?;
    build()?;
    let targets = chosen(&args.target)?;
    if args.list {
        for target in &targets {
            println!("{}", target.name);
        }
        return Ok(());
    }
    let time = Duration::from_secs_f64(args.minutes * 60.0);
    let outcomes = all(&targets, time, Start::Found)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&outcomes)?);
    } else {
        println!("{}", table(&outcomes));
    }
    if args.keep {
        for target in &targets {
            target.keep()?;
        }
    }
    judge(&outcomes)
}

/// Fuzzes all targets as a part of the tests. Deterministic: two runs on the same tree give the
/// same result.
///
/// # Errors
///
/// As for [`run`].
pub(crate) fn briefly() -> Result<()> {
    build()?;
    let outcomes = all(&chosen(&[])?, A_MINUTE, Start::Tree)?;
    println!("{}", table(&outcomes));
    judge(&outcomes)
}

/// Builds the fuzz programs.
fn build() -> Result<()> {
    let fuzz = root().join("tests/fuzz");
    let mut command = cargo(["build", "--release", "--target", &triple()]);
    command
        .args(["--manifest-path".into(), fuzz.join("Cargo.toml")])
        .args(["--target-dir".into(), root().join("target/fuzz")])
        // An explicit target keeps these flags from build scripts and macros.
        .env("RUSTFLAGS", "--cfg fuzzing")
        .env("RUSTC_WRAPPER", fuzz.join("rustc.sh"));
    step("fuzz programs", &mut command)
}

fn triple() -> String {
    format!("{ARCH}-unknown-linux-gnu")
}

fn program(name: &str) -> PathBuf {
    root()
        .join("target/fuzz")
        .join(triple())
        .join("release")
        .join(name)
}

/// Returns the targets with these names, or all targets.
fn chosen(names: &[String]) -> Result<Vec<Target>> {
    let mut targets = Vec::new();
    for program in PROGRAMS.map(program) {
        let output = Command::new(&program)
            .env_remove(VARIABLE)
            // libFuzzer warns about missing sanitizers.
            .stderr(Stdio::null())
            .output()
            .with_context(|| format!("Failed to start {}", program.display()))?;
        let listed = String::from_utf8_lossy(&output.stdout);
        targets.extend(listed.lines().map(|name| Target {
            name: name.to_owned(),
            program: program.clone(),
        }));
    }
    if let Some(unknown) = names
        .iter()
        .find(|name| targets.iter().all(|target| target.name != **name))
    {
        let known: Vec<&str> = targets.iter().map(|target| target.name.as_str()).collect();
        bail!(
            "There is no target {unknown}; there are {}",
            known.join(", ")
        );
    }
    targets.retain(|target| names.is_empty() || names.contains(&target.name));
    Ok(targets)
}

/// Runs the targets, one per processor at a time.
fn all(targets: &[Target], time: Duration, start: Start) -> Result<Vec<Outcome>> {
    let workers = thread::available_parallelism().map_or(1, Into::into);
    let workers = workers.min(targets.len()).max(1);
    // A round takes as long as its longest target, so all targets get the same time.
    let rounds = u32::try_from(targets.len().div_ceil(workers)).unwrap_or(1);
    let each = (time / rounds.max(1)).max(Duration::from_secs(1));
    eprintln!(
        "==> fuzz: {} targets, {} s each, {workers} at once",
        targets.len(),
        each.as_secs()
    );
    let bar = bar(each * rounds);
    let queue = Mutex::new(targets.iter().collect::<VecDeque<_>>());
    let next = || {
        queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front()
    };
    let started = Instant::now();
    let mut outcomes = thread::scope(|scope| {
        let work = || {
            let mut done = Vec::new();
            while let Some(target) = next() {
                done.push(target.run(each, start, |line| {
                    bar.set_position(started.elapsed().as_secs());
                    bar.set_message(format!("{}: {line}", target.name));
                })?);
            }
            anyhow::Ok(done)
        };
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        let mut outcomes = Vec::new();
        for thread in threads {
            match thread.join() {
                Ok(done) => outcomes.extend(done?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        anyhow::Ok(outcomes)
    })?;
    bar.finish_and_clear();
    let place = |name: &str| targets.iter().position(|target| target.name == name);
    outcomes.sort_by_key(|outcome| place(&outcome.target));
    Ok(outcomes)
}

fn bar(time: Duration) -> ProgressBar {
    let bar = ProgressBar::new(time.as_secs());
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} s  {wide_msg}") {
        bar.set_style(style);
    }
    bar
}

fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    table.set_header([
        "target",
        "executions",
        "a second",
        "branches",
        "corpus",
        "crashes",
    ]);
    let number = |number: u64| Cell::new(number).set_alignment(CellAlignment::Right);
    let mut sum = (0, 0);
    for outcome in outcomes {
        table.add_row([
            Cell::new(&outcome.target),
            number(outcome.executions),
            number(outcome.per_second),
            number(outcome.branches),
            number(outcome.corpus),
            number(outcome.crashes.len() as u64),
        ]);
        sum.0 += outcome.executions;
        sum.1 += outcome.crashes.len() as u64;
    }
    let none = || Cell::new("");
    table.add_row([
        Cell::new("all"),
        number(sum.0),
        none(),
        none(),
        none(),
        number(sum.1),
    ]);
    table
}

/// Fails if an assertion failed. The error says how to turn the input into a test.
fn judge(outcomes: &[Outcome]) -> Result<()> {
    let crashed: Vec<&Outcome> = outcomes
        .iter()
        .filter(|outcome| !outcome.crashes.is_empty())
        .collect();
    for outcome in &crashed {
        for crash in &outcome.crashes {
            eprintln!("{}: {}", outcome.target, crash.said);
            eprintln!(
                "    cp {} {}/",
                crash.input.display(),
                root()
                    .join("tests/fuzz/crashes")
                    .join(&outcome.target)
                    .display()
            );
        }
    }
    ensure!(
        crashed.is_empty(),
        "Something does not hold in {} targets; copied as shown the input is a unit test",
        crashed.len()
    );
    Ok(())
}
