//! Runs one command in one machine, from the start of QEMU to its end.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, anyhow, bail};

use super::image::{self, Image};
use super::qemu::{self, Channels, Qemu, Tail};
use super::wire::{FromMachine, Job, ToMachine};
use super::{Command, MODULES, Machine, OUTPUT, OUTPUT_VARIABLE, VARIABLE};
use crate::guest::wire::frame::Decoder;

/// Longest time for reading QEMU's pipes after QEMU has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Messages of the threads that read from QEMU.
enum Event {
    Message(Result<FromMachine>),
    Console(Vec<u8>),
    /// The port, the console or QEMU's standard error has ended, so QEMU has ended.
    Ended,
}

impl Machine {
    /// Boots the machine, runs a command in it and returns the exit code.
    ///
    /// `show` receives the machine's messages as they arrive. Bytes from `input` are typed at the
    /// command's terminal.
    ///
    /// # Errors
    ///
    /// When the kernel is unavailable, QEMU does not start, the timeout expires, or the machine
    /// ends without an exit code, as after a kernel panic. The last two errors contain the
    /// console's last lines.
    pub fn run(
        &self,
        command: &Command,
        input: Option<Receiver<Vec<u8>>>,
        mut show: impl FnMut(FromMachine) -> Result<()>,
    ) -> Result<u8> {
        let image = image::ensure(&self.kernel)?;
        let next = image::next_program()?;
        let job = ToMachine::Job(self.job(command, &image)).encode()?;
        let end = Instant::now() + self.timeout;

        let (qemu, channels) = Qemu::start(self, &image, &next)?;
        let mut port = channels.port.try_clone()?;
        let events = follow(channels);
        // A write fails only if QEMU has ended, which the code below reports.
        let _ = port.write_all(&job);
        if let Some(input) = input {
            thread::spawn(move || type_in(&input, &mut port));
        }

        let mut console = Tail::default();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match events.recv_timeout(left) {
                Ok(Event::Message(message)) => match message? {
                    FromMachine::Exit(code) => return Ok(code),
                    message => show(message)?,
                },
                Ok(Event::Console(bytes)) => console.push(&bytes),
                Ok(Event::Ended) | Err(RecvTimeoutError::Disconnected) => {
                    drop(qemu);
                    return last_words(&events, &mut console, &mut show).unwrap_or_else(|| {
                        Err(self.failed("ended without an exit code", &console))
                    });
                }
                Err(RecvTimeoutError::Timeout) => {
                    let what = format!(
                        "did not finish within {} s and was killed: give it more time if it needs that",
                        self.timeout.as_secs()
                    );
                    return Err(self.failed(&what, &console));
                }
            }
        }
    }

    fn job(&self, command: &Command, image: &Image) -> Job {
        let mut environment = command.environment.clone();
        environment.retain(|(name, _)| name != VARIABLE && name != OUTPUT_VARIABLE);
        environment.push((VARIABLE.to_owned(), "1".to_owned()));
        let output = self.output.as_ref().map(|_| PathBuf::from(OUTPUT));
        if output.is_some() {
            environment.push((OUTPUT_VARIABLE.to_owned(), OUTPUT.to_owned()));
        }
        Job {
            command: command.words.clone(),
            directory: command.directory.clone(),
            environment,
            modules: image.kernel.modules.clone(),
            load: MODULES.iter().map(|&name| name.to_owned()).collect(),
            output,
            terminal: command.terminal,
        }
    }

    fn failed(&self, what: &str, console: &Tail) -> Error {
        let kernel = &self.kernel;
        if let Some(panic) = console.panic() {
            return anyhow!(
                "The machine with kernel {kernel} {what}: {panic}{}",
                console.shown()
            );
        }
        anyhow!("The machine with kernel {kernel} {what}{}", console.shown())
    }
}

/// Starts the threads that read from QEMU.
fn follow(channels: Channels) -> Receiver<Event> {
    let (events, receiver) = mpsc::channel();
    let Channels {
        port,
        console,
        errors,
    } = channels;
    let messages = events.clone();
    thread::spawn(move || {
        let mut decoder = Decoder::default();
        qemu::read_all(port, |bytes| {
            decoder.push(bytes);
            while let Some(frame) = decoder.poll_frame() {
                let _ = messages.send(Event::Message(FromMachine::decode(&frame)));
            }
        });
        let _ = messages.send(Event::Ended);
    });
    let lines = events.clone();
    thread::spawn(move || tell(console, &lines));
    thread::spawn(move || tell(errors, &events));
    receiver
}

/// Passes the bytes of a pipe to the event loop as output of the console.
fn tell(pipe: impl std::io::Read, events: &Sender<Event>) {
    qemu::read_all(pipe, |bytes| {
        let _ = events.send(Event::Console(bytes.to_vec()));
    });
    let _ = events.send(Event::Ended);
}

/// Handles messages that were still in transit when QEMU ended. Returns the exit code if one of the
/// messages carries it.
fn last_words(
    events: &Receiver<Event>,
    console: &mut Tail,
    show: &mut impl FnMut(FromMachine) -> Result<()>,
) -> Option<Result<u8>> {
    let end = Instant::now() + LAST_WORDS;
    while let Ok(event) = events.recv_timeout(end.saturating_duration_since(Instant::now())) {
        match event {
            Event::Message(Ok(FromMachine::Exit(code))) => return Some(Ok(code)),
            Event::Message(Ok(message)) => {
                if let Err(error) = show(message) {
                    return Some(Err(error));
                }
            }
            Event::Console(bytes) => console.push(&bytes),
            Event::Message(Err(_)) | Event::Ended => {}
        }
    }
    None
}

/// Sends typed bytes to the machine until the port is closed.
fn type_in(input: &Receiver<Vec<u8>>, port: &mut UnixStream) {
    while let Ok(bytes) = input.recv() {
        let Ok(frame) = ToMachine::Input(bytes).encode() else {
            return;
        };
        if port.write_all(&frame).is_err() {
            return;
        }
    }
}

/// Creates the writable directory if it does not exist. Returns its canonical path.
///
/// # Errors
///
/// When the directory cannot be created, or its path is not UTF-8.
pub fn prepare_output(directory: &std::path::Path) -> Result<PathBuf> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("Cannot create the directory {}", directory.display()))?;
    let path = directory.canonicalize()?;
    if path.to_str().is_none() {
        bail!(
            "The path {} is not UTF-8: choose another directory",
            path.display()
        );
    }
    Ok(path)
}
