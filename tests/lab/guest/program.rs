//! Programs that the host runs in a guest: their start, output and end.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::{control::Control, wire::Command};
use crate::wait;

/// Deadline for the guest to confirm a start or a signal.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// A line that a program wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Time at which the host received the end of the line, in nanoseconds of the host's monotonic
    /// clock.
    pub host_ns: u64,
    /// True for a line of stderr.
    pub is_stderr: bool,
    /// The line without its end.
    pub text: String,
}

/// Output of a program so far, and its exit code after its end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Lines of both streams, in the order in which the host received them.
    pub lines: Vec<Line>,
    /// Exit code, 128 + signal for a killed program, or `None` while it runs.
    pub code: Option<i32>,
    /// Bytes after the last line end, first of stdout, then of stderr.
    partial: [Vec<u8>; 2],
}

impl Output {
    /// Returns the text of stdout.
    pub fn stdout(&self) -> String {
        self.text(false)
    }

    /// Returns the text of stderr.
    pub fn stderr(&self) -> String {
        self.text(true)
    }

    /// Returns the output of a program that ended with exit code 0.
    ///
    /// # Errors
    ///
    /// When the program is still running, or ended with another exit code. The text holds the exit
    /// code and the program's stderr.
    pub fn into_success(self) -> Result<Self> {
        let Some(code) = self.code else {
            bail!("The program in the guest is still running");
        };
        ensure!(
            code == 0,
            "The program in the guest ended with exit code {code}: {}",
            self.stderr().trim()
        );
        Ok(self)
    }

    fn text(&self, is_stderr: bool) -> String {
        let lines = self.lines.iter().filter(|line| line.is_stderr == is_stderr);
        lines.map(|line| format!("{}\n", line.text)).collect()
    }

    /// Adds the output of one frame.
    pub(super) fn add(&mut self, bytes: &[u8], is_stderr: bool, host_ns: u64) {
        let partial = &mut self.partial[usize::from(is_stderr)];
        for byte in bytes {
            if *byte == b'\n' {
                let text = String::from_utf8_lossy(partial).into_owned();
                self.lines.push(Line {
                    host_ns,
                    is_stderr,
                    text,
                });
                partial.clear();
            } else {
                partial.push(*byte);
            }
        }
    }

    /// Records the exit code. A last line becomes a line even without a line end.
    pub(super) fn finish(&mut self, code: i32, host_ns: u64) {
        for is_stderr in [false, true] {
            if !self.partial[usize::from(is_stderr)].is_empty() {
                self.add(b"\n", is_stderr, host_ns);
            }
        }
        self.code = Some(code);
    }
}

/// A program started in a guest.
pub struct Running {
    control: Control,
    id: u64,
    lines_taken: usize,
}

impl Control {
    /// Starts a program in the guest.
    ///
    /// # Errors
    ///
    /// When the guest cannot start the program, or does not answer.
    pub fn spawn(&self, program: &str, args: &[&str]) -> Result<Running> {
        let id = self.inner().new_id();
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let command = Command::Run {
            program: program.to_owned(),
            args,
        };
        self.request_as(id, command, REQUEST_DEADLINE)?;
        Ok(Running {
            control: self.clone(),
            id,
            lines_taken: 0,
        })
    }

    /// Runs a program in the guest to its end. An exit code other than 0 is no error.
    ///
    /// # Errors
    ///
    /// When the guest cannot start the program, or the program does not end within `deadline` and
    /// is then terminated.
    pub fn run(&self, program: &str, args: &[&str], deadline: Duration) -> Result<Output> {
        self.spawn(program, args)?.wait(deadline)
    }
}

impl Running {
    /// Waits for the next line. Returns `None` when the program has ended and all lines were
    /// returned.
    ///
    /// # Errors
    ///
    /// When the program writes no line and does not end within `deadline`.
    pub fn next_line(&mut self, deadline: Duration) -> Result<Option<Line>> {
        let (id, taken) = (self.id, self.lines_taken);
        let found = self
            .control
            .inner()
            .wait_until(wait::end_after(deadline), |state| {
                let output = state.outputs.get(&id)?;
                match output.lines.get(taken) {
                    Some(line) => Some(Some(line.clone())),
                    None => output.code.map(|_| None),
                }
            });
        let Some(line) = found else {
            bail!("The program in the guest wrote nothing and did not end within {deadline:?}");
        };
        self.lines_taken += usize::from(line.is_some());
        Ok(line)
    }

    /// Returns the output of the program so far.
    pub fn output(&self) -> Output {
        self.control
            .inner()
            .lock()
            .outputs
            .get(&self.id)
            .cloned()
            .unwrap_or_default()
    }

    /// Waits for the program's end and returns its output.
    ///
    /// # Errors
    ///
    /// When the program does not end within `deadline` and is then terminated.
    pub fn wait(self, deadline: Duration) -> Result<Output> {
        let id = self.id;
        let found = self
            .control
            .inner()
            .wait_until(wait::end_after(deadline), |state| {
                state
                    .outputs
                    .get(&id)
                    .filter(|output| output.code.is_some())
                    .cloned()
            });
        if let Some(output) = found {
            return Ok(output);
        }
        self.terminate()?;
        bail!(
            "The program in the guest did not end within {deadline:?}; it wrote: {}",
            self.output().stdout() + &self.output().stderr()
        );
    }

    /// Sends SIGTERM to the program.
    ///
    /// # Errors
    ///
    /// When the guest does not answer.
    pub fn terminate(&self) -> Result<()> {
        self.control
            .request(Command::Terminate { run: self.id })
            .map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_put_together_from_frames() {
        let mut output = Output::default();
        output.add(b"fir", false, 1);
        output.add(b"warning\n", true, 2);
        output.add(b"st\nlast", false, 3);
        output.finish(0, 4);
        assert_eq!(output.stdout(), "first\nlast\n");
        assert_eq!(output.stderr(), "warning\n");
        let times: Vec<_> = output.lines.iter().map(|line| line.host_ns).collect();
        assert_eq!(times, [2, 3, 4]);
    }

    #[test]
    fn bad_exit_code_is_named_with_stderr() {
        let mut output = Output::default();
        output.add(b"no agent answers\n", true, 1);
        output.finish(1, 2);
        let error = output.into_success().unwrap_err().to_string();
        assert!(error.contains("exit code 1: no agent answers"), "{error}");
    }
}
