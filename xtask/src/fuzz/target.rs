//! A fuzz target: its program, and libFuzzer's output.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::VARIABLE;
use crate::run::root;

/// Longest input, bytes. Longer inputs gain nothing: parsers refuse them by their length or repeat
/// themselves.
const MAX_INPUT_BYTES: usize = 4096;
/// Time for one input after which libFuzzer reports a crash, seconds.
const TIMEOUT_S: u32 = 10;
/// Memory above which libFuzzer reports a crash, MiB.
const MEMORY_MIB: u32 = 2048;

/// Inputs at the start of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// Inputs of the source tree and of earlier runs, with a new random seed.
    Found,
    /// Inputs of the source tree, with a constant seed: every run is the same.
    Tree,
}

/// A target and its program.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) program: PathBuf,
}

/// Result of a target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Outcome {
    pub(super) target: String,
    pub(super) executions: u64,
    pub(super) per_second: u64,
    /// Number of covered branches.
    pub(super) branches: u64,
    /// Number of inputs that each add coverage.
    pub(super) corpus: u64,
    pub(super) crashes: Vec<Crash>,
}

/// An input for which an assertion failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Crash {
    /// Message of the failure.
    pub(super) said: String,
    pub(super) input: PathBuf,
}

impl Target {
    /// Returns the directory with inputs of the source tree.
    fn kept(&self) -> PathBuf {
        root().join("tests/fuzz/corpus").join(&self.name)
    }

    /// Returns the directory with inputs found on this machine.
    fn found(&self) -> PathBuf {
        root().join("target/fuzz/corpus").join(&self.name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.env(VARIABLE, &self.name).stdin(Stdio::null());
        command
    }

    /// Runs the target for `time`. Passes each line of libFuzzer to `progress`.
    ///
    /// # Errors
    ///
    /// The program does not start, or ends without a run.
    pub(super) fn run(
        &self,
        time: Duration,
        start: Start,
        progress: impl Fn(&str),
    ) -> Result<Outcome> {
        let crashes = root().join("target/fuzz/crashes").join(&self.name);
        let found = match start {
            Start::Found => self.found(),
            Start::Tree => root().join("target/fuzz/brief").join(&self.name),
        };
        if start == Start::Tree {
            empty(&found)?;
        }
        for directory in [&crashes, &found] {
            fs::create_dir_all(directory)
                .with_context(|| format!("Failed to make {}", directory.display()))?;
        }
        let mut command = self.command();
        if start == Start::Tree {
            command.arg("-seed=1");
        }
        command
            .arg(format!("-max_total_time={}", time.as_secs()))
            .arg(format!("-max_len={MAX_INPUT_BYTES}"))
            .arg(format!("-timeout={TIMEOUT_S}"))
            .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
            .arg(format!("-artifact_prefix={}/", crashes.display()))
            .arg(&found);
        // libFuzzer writes new inputs to the first directory and only reads the others.
        if self.kept().exists() {
            command.arg(self.kept());
        }
        let mut child = command
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("Failed to start {}", self.program.display()))?;
        let mut reader = Reader::new(&self.name);
        let errors = child.stderr.take().context("libFuzzer has no output")?;
        for line in BufReader::new(errors).split(b'\n') {
            let line = line.context("Failed to read what libFuzzer says")?;
            let line = String::from_utf8_lossy(&line);
            reader.read(&line);
            progress(line.trim());
        }
        let status = child.wait().context("Failed to wait for libFuzzer")?;
        let outcome = reader.finish();
        ensure!(
            status.success() || !outcome.crashes.is_empty(),
            "{} ended with {status} and no input is to blame",
            self.name
        );
        Ok(outcome)
    }

    /// Replaces the inputs in the source tree by a minimal set with the coverage of all known
    /// inputs.
    ///
    /// # Errors
    ///
    /// libFuzzer or the file system failed.
    pub(super) fn keep(&self) -> Result<()> {
        let kept = self.kept();
        let least = root().join("target/fuzz/least").join(&self.name);
        empty(&least)?;
        fs::create_dir_all(&kept).with_context(|| format!("Failed to make {}", kept.display()))?;
        let status = self
            .command()
            // By covered edges, without execution counts.
            .args(["-set_cover_merge=1", "-use_counters=0"])
            .arg(format!("-max_len={MAX_INPUT_BYTES}"))
            .args([&least, &kept, &self.found()])
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .with_context(|| format!("Failed to start {}", self.program.display()))?;
        ensure!(
            status.success(),
            "Merging {} ended with {status}",
            self.name
        );
        empty(&kept)?;
        let entries =
            fs::read_dir(&least).with_context(|| format!("Failed to read {}", least.display()))?;
        for entry in entries {
            let entry = entry.context("Failed to read a directory")?;
            fs::copy(entry.path(), kept.join(entry.file_name()))
                .with_context(|| format!("Failed to copy {}", entry.path().display()))?;
        }
        Ok(())
    }
}

/// Makes an empty directory.
fn empty(directory: &Path) -> Result<()> {
    let failed = || format!("Failed to make {}", directory.display());
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(failed)?;
    }
    fs::create_dir_all(directory).with_context(failed)
}

/// Reads libFuzzer's output: `#1048576 pulse cov: 345 ft: 900 corp: 120/4Kb exec/s: 262144 rss:
/// 40Mb`, and after a crash the path of the input.
struct Reader {
    outcome: Outcome,
    said: String,
}

impl Reader {
    fn new(target: &str) -> Self {
        let target = target.to_owned();
        Self {
            outcome: Outcome {
                target,
                ..Outcome::default()
            },
            said: String::new(),
        }
    }

    fn read(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix('#') {
            self.counts(counts);
        } else if let Some((_, input)) = line.split_once("Test unit written to ") {
            self.outcome.crashes.push(Crash {
                said: std::mem::take(&mut self.said),
                input: PathBuf::from(input.trim()),
            });
        } else if line.contains("panicked at ") || line.contains("ERROR: libFuzzer:") {
            // A panic also ends as an error of libFuzzer, and the error's message says less.
            if self.said.is_empty() {
                self.said = line.trim().to_owned();
            }
        } else if self.said.ends_with(':') && !line.trim().is_empty() {
            // The message of a panic is on the next line.
            self.said.push(' ');
            self.said.push_str(line.trim());
        }
    }

    fn counts(&mut self, counts: &str) {
        let mut words = counts.split_whitespace();
        let number = |word: Option<&str>| word.and_then(|word| word.parse().ok());
        if let Some(executions) = number(words.next()) {
            self.outcome.executions = executions;
        }
        while let Some(word) = words.next() {
            match word {
                "cov:" => set(&mut self.outcome.branches, number(words.next())),
                "exec/s:" => set(&mut self.outcome.per_second, number(words.next())),
                "corp:" => {
                    let inputs = words.next().and_then(|word| word.split('/').next());
                    set(&mut self.outcome.corpus, number(inputs));
                }
                _ => {}
            }
        }
    }

    fn finish(self) -> Outcome {
        self.outcome
    }
}

fn set(place: &mut u64, number: Option<u64>) {
    if let Some(number) = number {
        *place = number;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Outcome {
        let mut reader = Reader::new("sdp");
        for line in text.lines() {
            reader.read(line);
        }
        reader.finish()
    }

    #[test]
    fn last_counts_are_those_of_the_run() {
        let outcome = read(
            "INFO: Seed: 1\n#2\tINITED cov: 7 ft: 7 corp: 1/1b exec/s: 0 rss: 27Mb\n\
             #300\tNEW    cov: 9 ft: 12 corp: 3/9b lim: 4 exec/s: 100 rss: 27Mb L: 5/5 MS: 1 Copy-\n\
             #3000\tDONE   cov: 9 ft: 13 corp: 4/16b lim: 4096 exec/s: 1500 rss: 27Mb\n\
             Done 3000 runs in 2 second(s)\n",
        );
        let expected = Outcome {
            target: "sdp".to_owned(),
            executions: 3000,
            per_second: 1500,
            branches: 9,
            corpus: 4,
            crashes: Vec::new(),
        };
        assert_eq!(outcome, expected);
    }

    #[test]
    fn crash_is_told_with_what_the_panic_said_and_its_input() {
        let outcome = read(
            "#300\tNEW    cov: 9 ft: 12 corp: 3/9b exec/s: 100 rss: 27Mb\n\n\
             thread '<unnamed>' panicked at common/src/x.rs:1:2:\nassertion failed\n\
             note: run with `RUST_BACKTRACE=1`\n==7== ERROR: libFuzzer: deadly signal\n\
             artifact_prefix='x/'; Test unit written to x/crash-12\nBase64: AA==\n",
        );
        let crash = Crash {
            said: "thread '<unnamed>' panicked at common/src/x.rs:1:2: assertion failed".to_owned(),
            input: PathBuf::from("x/crash-12"),
        };
        assert_eq!(outcome.crashes, [crash]);
        assert_eq!(outcome.executions, 300);
    }

    #[test]
    fn input_that_takes_too_long_is_a_crash() {
        let outcome = read(
            "==7== ERROR: libFuzzer: timeout after 11 seconds\n\
             artifact_prefix='x/'; Test unit written to x/timeout-12\n",
        );
        assert_eq!(outcome.crashes.len(), 1);
        assert!(outcome.crashes[0].said.contains("timeout after"));
    }
}
