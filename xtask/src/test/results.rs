//! Reads the output of the standard test harness: passed, failed and skipped tests.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

/// Counts of the tests of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    /// Tests that passed.
    pub(crate) passed: u64,
    /// Tests that failed.
    pub(crate) failed: u64,
    /// Tests marked `#[ignore]`, and tests that reported that they were skipped.
    pub(crate) skipped: u64,
}

impl Tally {
    /// Adds the results of another step.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Adds the counts of one `test result:` line of the standard test harness.
    fn add_line(&mut self, line: &str) {
        let Some(counts) = line.strip_prefix("test result: ") else {
            return;
        };
        for part in counts.split([';', '.']) {
            let mut words = part.split_whitespace();
            if let (Some(Ok(count)), Some(name)) =
                (words.next().map(str::parse::<u64>), words.next())
            {
                match name {
                    "passed" => self.passed += count,
                    "failed" => self.failed += count,
                    "ignored" => self.skipped += count,
                    _ => {}
                }
            }
        }
    }
}

/// Reader of a test program's output with `--show-output`.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    tally: Tally,
    section: Section,
    /// Test whose output follows in this section.
    test: String,
    /// Reasons of tests that passed without testing anything.
    skipped: BTreeMap<String, String>,
}

/// Sections of the harness's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Section {
    /// One line for each test, and the result.
    #[default]
    Tests,
    /// Output of passed tests.
    Successes,
    /// Output of failed tests.
    Failures,
}

impl Reader {
    /// Reads one line. Returns true if the line has to be shown, which is every line except the
    /// output of passed tests.
    pub(crate) fn read(&mut self, line: &str) -> bool {
        match line {
            "successes:" => self.section = Section::Successes,
            "failures:" => self.section = Section::Failures,
            _ if line.starts_with("test result: ") => {
                self.section = Section::Tests;
                self.tally.add_line(line);
            }
            _ => {}
        }
        if self.section != Section::Successes {
            return true;
        }
        if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            name.clone_into(&mut self.test);
        } else if let Some(reason) = skip_reason(line) {
            self.skipped
                .entry(self.test.clone())
                .or_insert_with(|| reason.to_owned());
        }
        false
    }

    /// Returns the counts, and each skipped test with its reason.
    pub(crate) fn finish(self) -> (Tally, BTreeMap<String, String>) {
        let mut tally = self.tally;
        let skipped = u64::try_from(self.skipped.len()).unwrap_or(u64::MAX);
        tally.passed = tally.passed.saturating_sub(skipped);
        tally.skipped += skipped;
        (tally, self.skipped)
    }
}

/// Returns the reason in a line by which a test reports that it was skipped; `None` for any other
/// line.
fn skip_reason(line: &str) -> Option<&str> {
    let rest = line
        .strip_prefix("skipped")
        .or_else(|| line.strip_prefix("Skipped"))?;
    Some(rest.strip_prefix([':', ','])?.trim())
}

/// Runs one step of tests, shows its output and adds its results to `tally`. `cargo xtask test` runs
/// the step alone by the name `alone`.
///
/// # Errors
///
/// The step does not start, its exit code is not 0, or it runs no test.
pub(super) fn tests(
    title: &str,
    alone: &str,
    command: &mut Command,
    tally: &mut Tally,
) -> Result<()> {
    eprintln!("==> {title}");
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("Failed to start {command:?}"))?;
    let mut results = Tally::default();
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line.with_context(|| format!("Failed to read from {command:?}"))?;
            println!("{line}");
            results.add_line(&line);
        }
    }
    let status = child
        .wait()
        .with_context(|| format!("Failed to wait for {command:?}"))?;
    tally.add(results);
    ensure!(
        status.success(),
        "{title}: {} failed ({status}); `cargo xtask test {alone}` runs this step alone",
        results.failed
    );
    ensure!(
        results.passed > 0,
        "{title}: no test ran; `cargo xtask test --list {alone}` lists the tests"
    );
    eprintln!(
        "    {title}: {} passed, {:.1} s",
        results.passed,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_line_is_added_to_the_tally() {
        let mut tally = Tally::default();
        tally.add_line("test result: ok. 10 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.02s");
        tally.add_line("running 3 tests");
        assert_eq!((tally.passed, tally.failed, tally.skipped), (10, 1, 2));
    }

    #[test]
    fn skipped_tests_are_not_counted_as_passed_and_have_a_reason() {
        let text = "\nrunning 4 tests\ntest a ... ok\ntest b ... ok\ntest c ... FAILED\n\
            test d ... ignored, started by other tests\n\nsuccesses:\n\n\
            ---- a stdout ----\nskipped: no TCX here\nskipped: and more\n\n\
            ---- b stdout ----\nit skipped: nothing\n\n\nsuccesses:\n    a\n    b\n\nfailures:\n\n\
            ---- c stdout ----\nskipped: but failed\nassertion failed\n\n\nfailures:\n    c\n\n\
            test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; \
            finished in 1.00s\n";
        let mut reader = Reader::default();
        let shown: Vec<_> = text.lines().filter(|line| reader.read(line)).collect();
        assert!(shown.contains(&"test a ... ok"));
        assert!(shown.contains(&"assertion failed"));
        assert!(!shown.iter().any(|line| line.contains("nothing")));
        let (tally, skipped) = reader.finish();
        assert_eq!((tally.passed, tally.failed, tally.skipped), (1, 1, 2));
        let skipped: Vec<_> = skipped.into_iter().collect();
        assert_eq!(skipped, [("a".to_owned(), "no TCX here".to_owned())]);
    }

    #[test]
    fn both_ways_to_say_that_a_test_is_skipped_are_read() {
        assert_eq!(skip_reason("skipped: needs root"), Some("needs root"));
        assert_eq!(
            skip_reason("Skipped, BPF is not permitted: EPERM"),
            Some("BPF is not permitted: EPERM")
        );
        assert_eq!(skip_reason("skipped frames: 3"), None);
    }
}
