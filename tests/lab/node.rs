//! A node of the lab: a network namespace. A VMS also has a mount namespace and a UTS namespace.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{netns, wait};

/// A node of the lab.
#[derive(Debug, Clone)]
pub struct Node {
    name: String,
    namespace: String,
    logs: PathBuf,
    /// Process that holds the node's mount and UTS namespaces; `None` if the node has only a
    /// network namespace.
    holder: Option<i32>,
}

impl Node {
    pub(crate) fn new(lab: &str, name: &str, logs: PathBuf, holder: Option<i32>) -> Self {
        Self {
            name: name.to_owned(),
            namespace: namespace(lab, name),
            logs,
            holder,
        }
    }

    /// Returns the name inside the lab, such as `vms1`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the name of the network namespace, as `ip netns` shows it.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Returns a command that runs `program` inside all namespaces of this node.
    ///
    /// On a VMS the working directory becomes `/`, so paths must be absolute.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        match self.holder {
            Some(pid) => {
                command
                    .arg(format!("--target={pid}"))
                    .args(["--mount", "--uts", "--net"]);
            }
            None => {
                command.arg(format!("--net={}", netns::path(&self.namespace).display()));
            }
        }
        command.arg("--").arg(program);
        command
    }

    /// Runs `action` on a thread inside the node's network namespace.
    ///
    /// # Errors
    ///
    /// When the namespace does not exist or `action` panics.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> T + Send) -> Result<T> {
        netns::within(&self.namespace, action)
    }

    /// Runs a command built by [`Node::command`] and returns its standard output.
    ///
    /// # Errors
    ///
    /// When the command can't be started or its exit code is not 0; the text has the command's
    /// standard error.
    pub fn output(&self, command: &mut Command) -> Result<String> {
        let output = command
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("Failed to run {command:?}"))?;
        let said = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(
            output.status.success(),
            "{command:?} failed on {} with {}: {}",
            self.name,
            output.status,
            said.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a command built by [`Node::command`] in the background. Appends the command's output
    /// to the log file `<node>-<label>.log`.
    ///
    /// # Errors
    ///
    /// When the log can't be opened or the program can't be started.
    pub fn spawn(&self, label: &str, mut command: Command) -> Result<Process> {
        let log = self.log_path(label);
        let file = open_log(&log)?;
        let errors = file.try_clone().context("Failed to share a log file")?;
        // A process group of its own protects the process from the terminal's Ctrl-C; the lab ends
        // the process.
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .with_context(|| format!("Failed to start {command:?}"))?;
        Ok(Process {
            id: child.id(),
            child: Some(child),
            log,
        })
    }

    /// Returns the path of the log file of the process started under `label`.
    #[must_use]
    pub fn log_path(&self, label: &str) -> PathBuf {
        self.logs.join(format!("{}-{label}.log", self.name))
    }
}

/// Returns the name of the namespace of a lab's node.
#[must_use]
pub fn namespace(lab: &str, node: &str) -> String {
    format!("{}{node}", prefix(lab))
}

/// Returns the common prefix of the names of a lab's namespaces.
#[must_use]
pub fn prefix(lab: &str) -> String {
    format!("rc{lab}-")
}

fn open_log(path: &Path) -> Result<File> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("Failed to create {}", directory.display()))?;
    }
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .with_context(|| format!("Failed to open the log {}", path.display()))
}

/// A process in the background. Dropping the value kills the process, unless it was detached.
#[derive(Debug)]
pub struct Process {
    /// `None` once the process is detached.
    child: Option<Child>,
    id: u32,
    log: PathBuf,
}

impl Process {
    /// Returns the process id, which is the same inside the node (there are no PID namespaces).
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Returns the path of the log file that receives the output.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Returns the output so far.
    #[must_use]
    pub fn printed(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Returns the exit status if the process has ended; always `None` once the process is
    /// detached.
    ///
    /// # Errors
    ///
    /// When the kernel does not report the state.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else {
            return Ok(None);
        };
        child
            .try_wait()
            .context("Failed to ask for a process's state")
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    ///
    /// When `deadline` passes first.
    pub fn wait(&mut self, deadline: Duration) -> Result<ExitStatus> {
        let what = format!("the end of process {} ({})", self.id(), self.log.display());
        wait::until(&what, deadline, || self.try_wait().ok().flatten())
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    ///
    /// When the process does not exist any more.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.id()).context("Process id out of range")?;
        kill(Pid::from_raw(pid), signal)
            .with_context(|| format!("Failed to send {signal} to process {pid}"))
    }

    /// Asks the process to end (SIGTERM) and waits for its end.
    ///
    /// # Errors
    ///
    /// When `deadline` passes first; the process is then killed.
    pub fn terminate(mut self, deadline: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        self.wait(deadline)
    }

    /// Kills the process (SIGKILL), as a crash would.
    pub fn kill(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Lets the process outlive this value. The lab still ends the process.
    pub fn detach(mut self) {
        if let Some(mut child) = self.child.take() {
            // The wait keeps the ended process from staying a zombie.
            thread::spawn(move || child.wait());
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
