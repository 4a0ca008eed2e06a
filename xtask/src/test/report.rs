//! Collects the output of the modules of tests in a host machine. `run-tests.sh` marks the beginning and
//! the end of each module's output.

use std::collections::BTreeMap;
use std::time::Duration;

use super::results::{Reader, Tally};

/// Results of all runs in a machine.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// Counts of all tests.
    pub(super) tally: Tally,
    /// Reasons of skipped tests by module and test.
    skipped: BTreeMap<(String, String), String>,
    /// One line for each module with a failure.
    pub(super) failures: Vec<String>,
    /// Run time of each module in seconds, in the order of the runs.
    times: Vec<(String, u64)>,
    /// The running module, and the reader of its output.
    current: Option<(String, Reader)>,
}

impl Report {
    /// Reads one line. Returns true if the line has to be shown.
    pub(super) fn read(&mut self, line: &str) -> bool {
        if let Some(module) = line.strip_prefix("==> ") {
            self.current = Some((module.to_owned(), Reader::default()));
        } else if let Some(end) = line.strip_prefix("<== ") {
            self.end(end);
            return false;
        } else if let Some((_, reader)) = &mut self.current {
            return reader.read(line);
        }
        true
    }

    /// Handles the line that ends a module: name, exit code, seconds.
    fn end(&mut self, end: &str) {
        let Some((module, reader)) = self.current.take() else {
            return;
        };
        let mut words = end.split(' ').skip(1);
        let code = words.next().unwrap_or_default();
        let seconds: u64 = words
            .next()
            .and_then(|word| word.parse().ok())
            .unwrap_or_default();
        self.times.push((module.clone(), seconds));
        let results = self.take_results(&module, reader);
        match code {
            "0" if results.passed + results.skipped == 0 => {
                self.failures.push(format!("{module} ran no test"));
            }
            "0" => {}
            // Exit codes of `timeout`: the time is over, or the module was killed after that.
            "124" | "137" => self
                .failures
                .push(format!("{module} was killed after {seconds} s")),
            _ => self.failures.push(format!(
                "{module}: {} failed, exit code {code}",
                results.failed
            )),
        }
        if code != "0" && results.failed == 0 {
            // The module failed without reporting a failed test.
            self.tally.failed += 1;
        }
    }

    fn take_results(&mut self, module: &str, reader: Reader) -> Tally {
        let (results, skipped) = reader.finish();
        self.tally.add(results);
        for (test, reason) in skipped {
            self.skipped.insert((module.to_owned(), test), reason);
        }
        results
    }

    /// Completes the report after the machine has ended: adds the output of the interrupted module,
    /// and names the modules that did not run.
    pub(super) fn close<'a>(&mut self, modules: impl Iterator<Item = &'a str>) {
        if let Some((module, reader)) = self.current.take() {
            self.take_results(&module, reader);
            self.tally.failed += 1;
            self.failures.push(format!("the machine ended in {module}"));
            self.times.push((module, 0));
        }
        for module in modules {
            if !self.times.iter().any(|(it, _)| it == module) {
                self.failures.push(format!("{module} did not run"));
            }
        }
    }

    pub(super) fn print(&self, kernel: &str, elapsed: Duration) {
        for ((module, test), reason) in &self.skipped {
            println!("skipped on {kernel}: {module} {test}: {reason}");
        }
        for failure in &self.failures {
            println!("failed on {kernel}: {failure}");
        }
        let times: Vec<String> = self
            .times
            .iter()
            .map(|(module, seconds)| format!("{module} {seconds}"))
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
    fn modules_after_one_that_fails_or_hangs_count_too() {
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
    fn module_without_a_test_is_a_failure() {
        let empty = "test result: ok. 0 passed; 0 failed; 0 ignored";
        let report = report(&format!("==> gate\n{empty}\n\n<== gate 0 1\n"));
        assert_eq!(report.failures, ["gate ran no test"]);
    }

    #[test]
    fn modules_that_the_machine_did_not_come_to_are_named() {
        let mut report = report(&format!("==> gate\n{PASSED}\n\n<== gate 0 1\n==> snoop\n"));
        report.close(["gate", "snoop", "relay"].into_iter());
        assert_eq!(
            report.failures,
            ["the machine ended in snoop", "relay did not run"]
        );
        assert_eq!((report.tally.passed, report.tally.failed), (2, 1));
    }
}
