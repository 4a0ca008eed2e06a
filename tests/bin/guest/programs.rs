//! Programs that the host asks for; their output goes to the host as it appears.

use std::{
    collections::HashMap,
    io::Read,
    os::unix::process::ExitStatusExt as _,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use anyhow::{Context as _, Result};
use lab::guest::wire::FromGuest;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::outbox::Outbox;

type Running = Arc<Mutex<HashMap<u64, Pid>>>;

/// Running programs by the id of the request that started them.
pub(crate) struct Programs {
    outbox: Arc<Outbox>,
    running: Running,
}

impl Programs {
    pub(crate) fn new(outbox: Arc<Outbox>) -> Self {
        Self {
            outbox,
            running: Running::default(),
        }
    }

    /// Starts a program under the id `run`.
    pub(crate) fn start(&self, run: u64, program: &str, args: &[String]) -> Result<()> {
        let mut child = Command::new(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("Cannot run {program}"))?;
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(run, pid);
        let outputs: Vec<_> = [
            child
                .stdout
                .take()
                .map(|pipe| forward(&self.outbox, run, false, pipe)),
            child
                .stderr
                .take()
                .map(|pipe| forward(&self.outbox, run, true, pipe)),
        ]
        .into_iter()
        .flatten()
        .collect();
        let (outbox, running) = (Arc::clone(&self.outbox), Arc::clone(&self.running));
        thread::spawn(move || {
            let status = child.wait();
            running
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&run);
            for output in outputs {
                let _ = output.join();
            }
            let code = status.map_or(-1, |status| {
                status
                    .code()
                    .unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
            });
            outbox.send_or_log(&FromGuest::Exit(run, code));
        });
        Ok(())
    }

    /// Asks a program to end (SIGTERM), or does nothing if the program has ended already.
    pub(crate) fn terminate(&self, run: u64) -> Result<()> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pid) = running.get(&run) {
            kill(*pid, Signal::SIGTERM).with_context(|| format!("Cannot signal process {pid}"))?;
        }
        Ok(())
    }
}

fn forward(
    outbox: &Arc<Outbox>,
    run: u64,
    is_stderr: bool,
    mut pipe: impl Read + Send + 'static,
) -> thread::JoinHandle<()> {
    let outbox = Arc::clone(outbox);
    thread::spawn(move || {
        let mut buffer = vec![0; 16_384];
        while let Ok(length) = pipe.read(&mut buffer) {
            if length == 0 {
                return;
            }
            outbox.send_or_log(&FromGuest::Output(
                run,
                is_stderr,
                buffer[..length].to_vec(),
            ));
        }
    })
}
