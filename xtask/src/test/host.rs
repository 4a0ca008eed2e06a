//! Runs tests on stock kernels: builds the test programs, and runs them one after the other in one
//! host machine per kernel.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::machine::wire::FromMachine;
use lab::machine::{self, Machine};
use serde_json::Value;

use super::levels::{Level, NOT_ON_HOST, QUICK, Selection, TARGETS, VM_ON_HOST};
use super::report::Report;
use super::results::Tally;
use crate::host::{self, MEMORY_MIB};
use crate::run::{build, root, workspace};

/// Script that runs the programs in the machine.
const SCRIPT: &str = include_str!("run-tests.sh");

/// Time limits.
struct Limits {
    /// Limit of one target in the machine.
    target: Duration,
    /// Limit of the whole machine.
    machine: Duration,
}

const WHOLE: Limits = Limits {
    target: Duration::from_secs(30 * 60),
    machine: Duration::from_secs(90 * 60),
};

/// Limits of a quick run: a target that hangs must leave time for the others.
const QUICK_LIMITS: Limits = Limits {
    target: Duration::from_secs(12 * 60),
    machine: Duration::from_secs(25 * 60),
};

/// Selection of tests.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part<'a> {
    /// The tests that CI runs.
    Quick,
    /// The tests of one level or of all levels that run on a stock kernel.
    Level(Option<Level>),
    /// Targets and tests by name.
    Named(&'a [String]),
}

/// A test program, and its tests to run.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Run {
    target: String,
    program: PathBuf,
    /// Names of tests; empty: all tests.
    tests: Vec<String>,
}

/// Runs tests on all kernels at the same time. Prints their output, the skipped tests with reasons,
/// and the time. Each machine has one processor, so several machines use several processors of this
/// machine.
///
/// # Errors
///
/// A test fails or hangs, a target runs no test, or the machine fails.
pub(super) fn run(kernels: &[&str], part: Part<'_>, tally: &mut Tally) -> Result<()> {
    build()?;
    let programs = programs()?;
    let runs = choose(part, &programs)?;
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
    eprintln!("==> {} test programs on kernel {kernel}", runs.len());
    let prefix = if named {
        format!("{kernel} | ")
    } else {
        String::new()
    };
    let started = Instant::now();
    let limits = match part {
        Part::Quick => QUICK_LIMITS,
        Part::Level(_) | Part::Named(_) => WHOLE,
    };
    let machine = Machine {
        kernel: kernel.to_owned(),
        cpus: 1,
        memory_mib: MEMORY_MIB,
        timeout: limits.machine,
        output: None,
    };
    let mut printed = Vec::new();
    let outcome = machine.run(&command(runs, limits.target), None, |message| {
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
    report.close(runs.iter().map(|run| run.target.as_str()));
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
        words.push(run.target.clone());
        words.push(run.program.display().to_string());
        words.push(run.tests.len().to_string());
        words.extend(run.tests.iter().cloned());
    }
    // The same environment as cargo gives a test program.
    let package = root().join("tests");
    let mut environment = machine::environment();
    environment.retain(|(name, _)| name != "CARGO_MANIFEST_DIR");
    environment.push((
        "CARGO_MANIFEST_DIR".to_owned(),
        package.display().to_string(),
    ));
    machine::Command {
        words,
        directory: package,
        environment,
        terminal: None,
    }
}

/// Builds the test programs and returns their paths by target.
fn programs() -> Result<BTreeMap<String, PathBuf>> {
    let mut command = workspace("test");
    command.args(["--no-run", "--message-format", "json-render-diagnostics"]);
    for (_, targets) in TARGETS {
        for target in targets {
            command.args(["--test", target]);
        }
    }
    eprintln!("==> build of the test programs");
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("Failed to start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} ended with {}",
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(test_program)
        .collect())
}

/// Reads one message of cargo: the name of a test target and the path of its program.
fn test_program(message: &str) -> Option<(String, PathBuf)> {
    let message: Value = serde_json::from_str(message).ok()?;
    let target = message.get("target")?;
    let is_test = target
        .get("kind")?
        .as_array()?
        .iter()
        .any(|kind| kind == "test");
    let name = target.get("name")?.as_str()?;
    let program = message.get("executable")?.as_str()?;
    is_test.then(|| (name.to_owned(), program.into()))
}

fn choose(part: Part<'_>, programs: &BTreeMap<String, PathBuf>) -> Result<Vec<Run>> {
    let selected = |selection: &Selection| {
        run_of(
            selection.target,
            selection
                .tests
                .iter()
                .map(|&test| test.to_owned())
                .collect(),
            programs,
        )
    };
    match part {
        Part::Quick => QUICK.iter().map(selected).collect(),
        Part::Level(level) => {
            let mut runs = Vec::new();
            for (of, targets) in TARGETS {
                if level.is_some_and(|level| level != of) {
                    continue;
                }
                if of == Level::Vm {
                    runs.extend(VM_ON_HOST.iter().map(selected));
                    continue;
                }
                let targets = targets.iter().filter(|it| !NOT_ON_HOST.contains(it));
                runs.extend(targets.map(|target| run_of(target, Vec::new(), programs)));
            }
            ensure!(
                !runs.is_empty(),
                "That level has nothing to run on a host machine: take program, network or vm"
            );
            runs.into_iter().collect()
        }
        Part::Named(names) => named(names, programs, listed),
    }
}

fn run_of(target: &str, tests: Vec<String>, programs: &BTreeMap<String, PathBuf>) -> Result<Run> {
    let program = programs
        .get(target)
        .with_context(|| format!("cargo built no test program {target}"))?;
    Ok(Run {
        target: target.to_owned(),
        program: program.clone(),
        tests,
    })
}

/// Finds targets and tests by name, each target once.
fn named(
    names: &[String],
    programs: &BTreeMap<String, PathBuf>,
    list: impl Fn(&Path) -> Result<Vec<String>>,
) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    for name in names {
        if programs.contains_key(name) {
            runs.retain(|run| run.target != *name);
            runs.push(run_of(name, Vec::new(), programs)?);
            continue;
        }
        let mut found = false;
        for (target, program) in programs {
            let test = list(program)?
                .into_iter()
                .find(|test| test == name || test.rsplit("::").next() == Some(name));
            let Some(test) = test else { continue };
            found = true;
            match runs.iter_mut().find(|run| run.target == *target) {
                // The whole target is selected already.
                Some(run) if run.tests.is_empty() => {}
                Some(run) => run.tests.push(test),
                None => runs.push(run_of(target, vec![test], programs)?),
            }
        }
        if !found {
            bail!("{name:?} is no test target of the tests package, nor a test of one");
        }
    }
    Ok(runs)
}

/// Returns the names of a program's tests.
fn listed(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program)
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("Failed to start {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn programs() -> BTreeMap<String, PathBuf> {
        ["gate", "relay", "snoop"]
            .map(|name| (name.to_owned(), PathBuf::from(format!("/t/{name}-1"))))
            .into()
    }

    fn list(program: &Path) -> Result<Vec<String>> {
        Ok(match program.to_str() {
            Some("/t/gate-1") => vec!["opens".to_owned(), "closes".to_owned()],
            Some("/t/relay-1") => vec!["inner::restores".to_owned()],
            _ => Vec::new(),
        })
    }

    fn names(names: &[&str]) -> Result<Vec<(String, Vec<String>)>> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let runs = named(&names, &programs(), list)?;
        Ok(runs
            .into_iter()
            .map(|run| (run.target, run.tests))
            .collect())
    }

    #[test]
    fn targets_and_tests_are_found_by_name() {
        assert_eq!(
            names(&["opens", "snoop", "closes", "restores"]).unwrap(),
            [
                (
                    "gate".to_owned(),
                    vec!["opens".to_owned(), "closes".to_owned()]
                ),
                ("snoop".to_owned(), Vec::new()),
                ("relay".to_owned(), vec!["inner::restores".to_owned()]),
            ]
        );
    }

    #[test]
    fn a_whole_target_has_its_tests_once() {
        for order in [["gate", "opens"], ["opens", "gate"]] {
            assert_eq!(
                names(&order).unwrap(),
                [("gate".to_owned(), Vec::new())],
                "{order:?}"
            );
        }
    }

    #[test]
    fn unknown_name_is_refused() {
        let error = names(&["gates"]).unwrap_err();
        assert!(error.to_string().contains("\"gates\""), "{error}");
    }

    #[test]
    fn only_test_targets_are_taken_from_cargos_messages() {
        let message = |kind: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"gate"}},"executable":{executable}}}"#
            )
        };
        assert_eq!(
            test_program(&message("test", "\"/t/gate-1\"")),
            Some(("gate".to_owned(), "/t/gate-1".into()))
        );
        assert_eq!(test_program(&message("bin", "\"/t/gate\"")), None);
        assert_eq!(test_program(&message("lib", "null")), None);
        assert_eq!(test_program("Compiling"), None);
    }
}
