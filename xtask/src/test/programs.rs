//! The test programs of the package `tests`, one for each level: their tests by name, and the runs
//! of their modules.
//!
//! The programs themselves say which tests they have. A test's path is the path of its function in
//! the program, such as `gate::frames_are_held_while_the_agent_is_away`, and its module is the first
//! part of the path. Each module runs in a process of its own, so that what a test leaves behind
//! ends with its module.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::levels::{Level, PROGRAMS};
use crate::run::{root, workspace};

/// Variable in which cargo tells a test program the folder of its package.
pub(super) const PACKAGE_VARIABLE: &str = "CARGO_MANIFEST_DIR";

/// A built test program.
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) level: Level,
    path: PathBuf,
    /// Paths of all tests, in the program's order.
    tests: Vec<String>,
}

/// Tests of one module, for one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) level: Level,
    pub(super) module: String,
    pub(super) program: PathBuf,
    /// Paths of the tests to run.
    pub(super) tests: Vec<String>,
}

/// Folder of the package, the working directory of its tests.
pub(super) fn package() -> PathBuf {
    root().join("tests")
}

/// Builds the test programs and asks them for their tests.
///
/// # Errors
///
/// cargo fails, or a program does not list its tests.
pub(super) fn built() -> Result<Vec<Program>> {
    let mut command = workspace("test");
    command.args(["--no-run", "--message-format", "json-render-diagnostics"]);
    for (_, name) in PROGRAMS {
        command.args(["--test", name]);
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
    let messages = String::from_utf8_lossy(&output.stdout);
    let program = |(level, name): (Level, &str)| {
        let path = messages.lines().find_map(|it| executable(it, name));
        let path = path.with_context(|| format!("cargo built no test program {name}"))?;
        let tests = listed(&path)?;
        Ok(Program { level, path, tests })
    };
    PROGRAMS.into_iter().map(program).collect()
}

/// Reads one message of cargo. Returns the path of the test program with this name.
fn executable(message: &str, name: &str) -> Option<PathBuf> {
    let message: Value = serde_json::from_str(message).ok()?;
    let target = message.get("target")?;
    let is_test = target
        .get("kind")?
        .as_array()?
        .iter()
        .any(|kind| kind == "test");
    let program = message.get("executable")?.as_str()?;
    (is_test && target.get("name")? == name).then(|| program.into())
}

/// Returns the paths of a program's tests.
fn listed(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program)
        .args(["--list", "--format", "terse"])
        .output()
        .with_context(|| format!("Failed to start {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} does not list its tests: {}",
        program.display(),
        output.status
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect())
}

impl Program {
    /// Returns a run of each module.
    pub(super) fn runs(&self) -> Vec<Run> {
        let mut runs = Vec::new();
        for test in &self.tests {
            self.add(test, &mut runs);
        }
        runs
    }

    /// Adds a test to the run of its module.
    fn add(&self, test: &str, runs: &mut Vec<Run>) {
        let module = test.split("::").next().unwrap_or(test);
        let own = |it: &&mut Run| it.program == self.path && it.module == module;
        match runs.iter_mut().find(own) {
            Some(run) if run.tests.iter().any(|it| it == test) => {}
            Some(run) => run.tests.push(test.to_owned()),
            None => runs.push(Run {
                level: self.level,
                module: module.to_owned(),
                program: self.path.clone(),
                tests: vec![test.to_owned()],
            }),
        }
    }

    /// Returns the tests whose path matches a name in this way.
    fn matching(&self, name: &str, is_match: fn(&str, &str) -> bool) -> Vec<&str> {
        let tests = self.tests.iter().map(String::as_str);
        tests.filter(|test| is_match(test, name)).collect()
    }
}

/// How a name can mean a test, the closest way first: the test or a module above it, by the whole
/// path or its end; a part of the path that begins with a word.
const MATCHES: [fn(&str, &str) -> bool; 3] = [
    |test, name| test == name || is_within(test, name),
    |test, name| {
        let mut ends = test.match_indices("::").map(|(at, _)| &test[at + 2..]);
        ends.any(|end| end == name || is_within(end, name))
    },
    |test, name| {
        let mut places = test.match_indices(name).map(|(at, _)| &test[..at]);
        places.any(|before| before.is_empty() || before.ends_with(['_', ':']))
    },
];

fn is_within(test: &str, module: &str) -> bool {
    test.strip_prefix(module)
        .is_some_and(|rest| rest.starts_with("::"))
}

/// Returns the runs for modules and tests by name, in the order of the names.
///
/// # Errors
///
/// A name means no test.
pub(super) fn named<S: AsRef<str>>(programs: &[Program], names: &[S]) -> Result<Vec<Run>> {
    let mut runs = Vec::new();
    for name in names.iter().map(AsRef::as_ref) {
        let found = MATCHES.into_iter().find_map(|is_match| {
            let found: Vec<(&Program, &str)> = programs
                .iter()
                .flat_map(|program| {
                    let tests = program.matching(name, is_match);
                    tests.into_iter().map(move |test| (program, test))
                })
                .collect();
            (!found.is_empty()).then_some(found)
        });
        let found = found.with_context(|| {
            format!(
                "No test is named {name:?}. `cargo xtask test --list` lists the tests of program, \
                 network and vm; `cargo xtask test unit {name}` looks among the unit tests"
            )
        })?;
        for (program, test) in found {
            program.add(test, &mut runs);
        }
    }
    Ok(runs)
}

impl Run {
    /// Returns the command that runs the tests on this machine, in the environment that cargo gives
    /// a test program. The tests run serially, because they share the machine's processors with the
    /// guests that they start.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .args(&self.tests)
            .args(["--exact", "--test-threads", "1"])
            .current_dir(package())
            .env(PACKAGE_VARIABLE, package());
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(level: Level, path: &str, tests: &[&str]) -> Program {
        Program {
            level,
            path: path.into(),
            tests: tests.iter().map(|&test| test.to_owned()).collect(),
        }
    }

    fn programs() -> [Program; 2] {
        [
            program(
                Level::Network,
                "/t/network-1",
                &[
                    "aggregates::gate_is_passed",
                    "attacks::gate::opens_for_nobody",
                    "gate::closes",
                    "gate::opens",
                    "snoop::finds_listeners",
                ],
            ),
            program(Level::Vm, "/t/vm-1", &["relay::inner::restores"]),
        ]
    }

    fn names(names: &[&str]) -> Vec<(String, String)> {
        let runs = named(&programs(), names).unwrap();
        runs.into_iter()
            .map(|run| (run.module, run.tests.join(" ")))
            .collect()
    }

    fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(module, tests)| ((*module).to_owned(), (*tests).to_owned()))
            .collect()
    }

    #[test]
    fn modules_and_tests_are_found_by_name() {
        assert_eq!(
            names(&["gate::opens", "snoop", "closes", "inner"]),
            pairs(&[
                ("gate", "gate::opens gate::closes"),
                ("snoop", "snoop::finds_listeners"),
                ("relay", "relay::inner::restores"),
            ])
        );
        let [(module, tests)] = &names(&["opens_for"])[..] else {
            panic!("a part of a name");
        };
        assert_eq!(
            (module.as_str(), tests.as_str()),
            ("attacks", "attacks::gate::opens_for_nobody")
        );
    }

    #[test]
    fn module_is_not_a_part_of_another_modules_path() {
        assert_eq!(
            names(&["gate"]),
            pairs(&[("gate", "gate::closes gate::opens")])
        );
        assert_eq!(
            names(&["attacks::gate"]),
            pairs(&[("attacks", "attacks::gate::opens_for_nobody")])
        );
    }

    #[test]
    fn test_runs_once_whatever_names_it() {
        for order in [["gate", "opens"], ["opens", "gate"]] {
            let runs = names(&order);
            assert_eq!(runs.len(), 1, "{order:?}");
            assert_eq!(runs[0].1.split(' ').count(), 2, "{order:?}");
        }
    }

    #[test]
    fn unknown_name_is_refused() {
        let error = named(&programs(), &["gates"]).unwrap_err().to_string();
        assert!(error.contains("\"gates\""), "{error}");
        assert!(error.contains("cargo xtask test --list"), "{error}");
    }

    #[test]
    fn each_module_of_a_program_runs_once() {
        let [network, _] = programs();
        let runs = network.runs();
        let modules: Vec<_> = runs.iter().map(|run| run.module.as_str()).collect();
        assert_eq!(modules, ["aggregates", "attacks", "gate", "snoop"]);
        let tests: Vec<String> = runs.into_iter().flat_map(|run| run.tests).collect();
        assert_eq!(tests, network.tests);
    }

    #[test]
    fn only_test_programs_are_taken_from_cargos_messages() {
        let message = |kind: &str, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","target":{{"kind":["{kind}"],"name":"vm"}},"executable":{executable}}}"#
            )
        };
        let test = message("test", "\"/t/vm-1\"");
        assert_eq!(executable(&test, "vm"), Some("/t/vm-1".into()));
        assert_eq!(executable(&test, "network"), None);
        assert_eq!(executable(&message("bin", "\"/t/vm\""), "vm"), None);
        assert_eq!(executable(&message("lib", "null"), "vm"), None);
        assert_eq!(executable("Compiling", "vm"), None);
    }
}
