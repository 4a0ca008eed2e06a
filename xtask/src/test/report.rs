//! Collects the output of the test programs in a host machine. `run-tests.sh` marks the beginning
//! and the end of each program's output.

use std::collections::BTreeMap;
use std::time::Duration;

use super::results::{Reader, Tally};

/// Results of all runs in a machine.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Counts of all tests.
    pub(super) tally: Tally,
    /// Reasons of skipped tests by target and test.
    skipped: BTreeMap<(String, String), String>,
    /// One line for each target with a failure.
    pub(super) failures: Vec<String>,
    /// Run time of each target in seconds, in the order of the runs.
    times: Vec<(String, u64)>,
    /// The running target, and the reader of its output.
    current: Option<(String, Reader)>,
}

impl Report {
    /// Reads one line. Returns true if the line has to be shown.
    pub(super) fn read(&mut self, line: &str) -> bool {
        if let Some(target) = line.strip_prefix("==> ") {
            self.current = Some((target.to_owned(), Reader::default()));
        } else if let Some(end) = line.strip_prefix("<== ") {
            self.end(end);
            return false;
        } else if let Some((_, reader)) = &mut self.current {
            return reader.read(line);
        }
        true
    }

    /// Handles the line that ends a target: name, exit code, seconds.
    fn end(&mut self, end: &str) {
        let Some((target, reader)) = self.current.take() else {
            return;
        };
        let mut words = end.split(' ').skip(1);
        let code = words.next().unwrap_or_default();
        let seconds: u64 = words
            .next()
            .and_then(|word| word.parse().ok())
            .unwrap_or_default();
        self.times.push((target.clone(), seconds));
        let results = self.take_results(&target, reader);
        match code {
            "0" if results.passed + results.skipped == 0 => {
                self.failures.push(format!("{target} ran no test"));
            }
            "0" => {}
            // Exit codes of `timeout`: the time is over, or the target was killed after that.
            "124" | "137" => self
                .failures
                .push(format!("{target} was killed after {seconds} s")),
            _ => self.failures.push(format!(
                "{target}: {} failed, exit code {code}",
                results.failed
            )),
        }
        if code != "0" && results.failed == 0 {
            // The target failed without reporting a failed test.
            self.tally.failed += 1;
        }
    }

    fn take_results(&mut self, target: &str, reader: Reader) -> Tally {
        let (results, skipped) = reader.finish();
        self.tally.add(results);
        for (test, reason) in skipped {
            self.skipped.insert((target.to_owned(), test), reason);
        }
        results
    }

    /// Completes the report after the machine has ended: adds the output of the interrupted target,
    /// and names the targets that did not run.
    pub(super) fn close<'a>(&mut self, targets: impl Iterator<Item = &'a str>) {
        if let Some((target, reader)) = self.current.take() {
            self.take_results(&target, reader);
            self.tally.failed += 1;
            self.failures.push(format!("the machine ended in {target}"));
            self.times.push((target, 0));
        }
        for target in targets {
            if !self.times.iter().any(|(it, _)| it == target) {
                self.failures.push(format!("{target} did not run"));
            }
        }
    }

    pub(super) fn print(&self, kernel: &str, elapsed: Duration) {
        for ((target, test), reason) in &self.skipped {
            println!("skipped on {kernel}: {target} {test}: {reason}");
        }
        for failure in &self.failures {
            println!("failed on {kernel}: {failure}");
        }
        let times: Vec<String> = self
            .times
            .iter()
            .map(|(target, seconds)| format!("{target} {seconds}"))
            .collect();
        println!("seconds on {kernel}: {}", times.join(", "));
        println!(
            "kernel {kernel}: {} passed, {} failed, {} skipped in {:.0} s",
            self.tally.passed,
            self.tally.failed,
            self.tally.skipped,
            elapsed.as_secs_f64()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSED: &str = "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured";

    fn report(text: &str) -> Report {
        let mut report = Report::default();
        for line in text.lines() {
            report.read(line);
        }
        report
    }

    #[test]
    fn targets_after_one_that_fails_or_hangs_count_too() {
        let report = report(&format!(
            "==> gate\ntest a ... FAILED\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n\n\
             <== gate 101 12\n==> relay\ntest b ... \n<== relay 124 1800\n==> snoop\n{PASSED}\n\n\
             <== snoop 0 3\n"
        ));
        assert_eq!((report.tally.passed, report.tally.failed), (3, 2));
        assert_eq!(
            report.failures,
            [
                "gate: 1 failed, exit code 101",
                "relay was killed after 1800 s"
            ]
        );
    }

    #[test]
    fn target_without_a_test_is_a_failure() {
        let empty = "test result: ok. 0 passed; 0 failed; 0 ignored";
        let report = report(&format!("==> gate\n{empty}\n\n<== gate 0 1\n"));
        assert_eq!(report.failures, ["gate ran no test"]);
    }

    #[test]
    fn targets_that_the_machine_did_not_come_to_are_named() {
        let mut report = report(&format!("==> gate\n{PASSED}\n\n<== gate 0 1\n==> snoop\n"));
        report.close(["gate", "snoop", "relay"].into_iter());
        assert_eq!(
            report.failures,
            ["the machine ended in snoop", "relay did not run"]
        );
        assert_eq!((report.tally.passed, report.tally.failed), (2, 1));
    }
}
