//! PID 1 of the host machine: loads the kernel's modules, runs the command that the outside sends,
//! and sends back the command's output and exit code. The machine's `init.sh` starts this program;
//! it is not for use by hand.

use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lab::guest::wire::frame::{Decoder, MAX_PAYLOAD};
use lab::machine::OUTPUT_TAG;
use lab::machine::wire::{FromMachine, Job, PORT_NAME, ToMachine};
use nix::mount::{MsFlags, mount};
use nix::pty::{Winsize, openpty};
use nix::sys::wait::{WaitStatus, wait};

/// Time limit for the port to appear after its driver was loaded.
const PORT_DEADLINE: Duration = Duration::from_secs(60);

/// Time limit for the end of the output once the command has ended: a process that the command left
/// behind may keep the output open for ever.
const OUTPUT_DEADLINE: Duration = Duration::from_secs(5);

/// Time limit for the outside to end the machine after the last message.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// Exit code that a shell returns for a command that cannot be started.
const NOT_STARTED: u8 = 127;

fn main() {
    if std::process::id() != 1 {
        eprintln!("machine-init is the first process of the host machine: `cargo xtask host`");
        std::process::exit(1);
    }
    if let Err(error) = run() {
        println!("machine: {error:#}");
    } else {
        thread::sleep(END_DEADLINE);
    }
    // The kernel panics if PID 1 ends, so PID 1 turns the machine off and never returns.
    let _ = fs::write("/proc/sysrq-trigger", "o");
    loop {
        thread::park();
    }
}

fn run() -> Result<()> {
    let file = open_port()?;
    let (job, decoder) = receive_job(&file)?;
    let port = Port(Arc::new(Mutex::new(file.try_clone()?)));
    set_up(&job, &port)?;
    port.send(&FromMachine::Started)?;
    let code = match Running::start(&job, &port, file, decoder) {
        Ok(running) => running.finish()?,
        Err(error) => {
            port.send(&FromMachine::Errors(format!("{error:#}\n").into_bytes()))?;
            NOT_STARTED
        }
    };
    port.send(&FromMachine::Exit(code))
}

/// The virtio-serial port, shared by all threads that send.
#[derive(Clone)]
struct Port(Arc<Mutex<File>>);

impl Port {
    fn send(&self, message: &FromMachine) -> Result<()> {
        let bytes = message.encode()?;
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        file.write_all(&bytes)
            .context("Cannot write to the machine's port")
    }

    /// Starts a thread that sends all bytes of `from` until their end, and then drops `closed`.
    fn forward(
        &self,
        mut from: impl Read + Send + 'static,
        kind: fn(Vec<u8>) -> FromMachine,
        closed: Sender<()>,
    ) {
        let port = self.clone();
        thread::spawn(move || {
            let mut chunk = vec![0; MAX_PAYLOAD];
            // A terminal signals its end by the error EIO.
            while let Ok(length @ 1..) = from.read(&mut chunk) {
                if port.send(&kind(chunk[..length].to_vec())).is_err() {
                    break;
                }
            }
            drop(closed);
        });
    }
}

fn open_port() -> Result<File> {
    let end = Instant::now() + PORT_DEADLINE;
    loop {
        if let Some(path) = find_port() {
            return File::options()
                .read(true)
                .write(true)
                .open(&path)
                .with_context(|| format!("Cannot open the machine's port {}", path.display()));
        }
        ensure!(
            Instant::now() < end,
            "No virtio-serial port named {PORT_NAME} appeared"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

fn find_port() -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/class/virtio-ports").ok()?;
    entries.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim() == PORT_NAME).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

fn receive_job(mut port: &File) -> Result<(Job, Decoder)> {
    let mut decoder = Decoder::default();
    let mut chunk = vec![0; MAX_PAYLOAD];
    loop {
        let length = port.read(&mut chunk).context("Cannot read the job")?;
        ensure!(length > 0, "The outside is gone");
        decoder.push(&chunk[..length]);
        if let Some(frame) = decoder.poll_frame() {
            match ToMachine::decode(&frame)? {
                ToMachine::Job(job) => return Ok((job, decoder)),
                ToMachine::Input(_) => bail!("Something was typed before there was a job"),
            }
        }
    }
}

/// Sets the machine up as a host: names, loopback, modules, the writable directory.
fn set_up(job: &Job, port: &Port) -> Result<()> {
    fs::write("/proc/sys/kernel/hostname", "machine").context("Cannot set the host's name")?;
    // libvirt looks up its own host name, and without this file waits long for missing name
    // servers.
    fs::write(
        "/etc/hosts",
        "127.0.0.1 localhost machine\n::1 localhost machine\n",
    )
    .context("Cannot write /etc/hosts")?;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let modules = Path::new("/lib/modules").join(release.trim());
    fs::create_dir_all(&modules)?;
    mount(
        Some(&job.modules),
        &modules,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| format!("Cannot have {} as modules", job.modules.display()))?;
    // A module that the kernel lacks is only reported, because the command may not need it.
    let loaded = command("modprobe", job)
        .arg("--all")
        .args(&job.load)
        .output()
        .context("Cannot run modprobe; install kmod outside")?;
    for line in String::from_utf8_lossy(&loaded.stderr).lines() {
        port.send(&FromMachine::Notice(line.to_owned()))?;
    }
    let up = command("ip", job)
        .args(["link", "set", "lo", "up"])
        .status();
    if !up.is_ok_and(|status| status.success()) {
        port.send(&FromMachine::Notice("cannot set lo up by ip".to_owned()))?;
    }
    if let Some(output) = &job.output {
        fs::create_dir_all(output)?;
        mount(
            Some(OUTPUT_TAG),
            output,
            Some("9p"),
            MsFlags::empty(),
            // Without a cache, everything that a program has written is outside when the machine is
            // killed.
            Some("trans=virtio,version=9p2000.L,msize=512000,cache=none"),
        )
        .with_context(|| format!("Cannot mount {}", output.display()))?;
    }
    Ok(())
}

/// Returns a command with the job's `PATH` and no input.
fn command(program: &str, job: &Job) -> Command {
    let path = job.environment.iter().find(|(name, _)| name == "PATH");
    let mut command = Command::new(program);
    if let Some((name, value)) = path {
        command.env(name, value);
    }
    command.stdin(Stdio::null());
    command
}

/// The running command.
struct Running {
    child: Child,
    /// Disconnects once all output has ended.
    closed: Receiver<()>,
}

impl Running {
    fn start(job: &Job, port: &Port, input: File, decoder: Decoder) -> Result<Self> {
        let (program, arguments) = job.command.split_first().context("There is no command")?;
        // A session of its own keeps the command from signals that are meant for PID 1.
        let mut command = Command::new("setsid");
        let (sender, closed) = mpsc::channel();
        let terminal = job.terminal.map(terminal).transpose()?;
        if let Some((_, theirs)) = &terminal {
            command
                .arg("--ctty")
                .stdin(theirs.try_clone()?)
                .stdout(theirs.try_clone()?)
                .stderr(theirs.try_clone()?);
        } else {
            command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
        }
        let mut child = command
            .arg("--")
            .arg(program)
            .args(arguments)
            .env_clear()
            .envs(job.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(&job.directory)
            .spawn()
            .with_context(|| format!("Cannot start {program} in {}", job.directory.display()))?;
        if let Some(stdout) = child.stdout.take() {
            port.forward(stdout, FromMachine::Output, sender.clone());
        }
        if let Some(stderr) = child.stderr.take() {
            port.forward(stderr, FromMachine::Errors, sender.clone());
        }
        if let Some((ours, theirs)) = terminal {
            drop(theirs);
            let keyboard = ours.try_clone()?;
            thread::spawn(move || type_in(input, decoder, keyboard));
            port.forward(ours, FromMachine::Output, sender);
        }
        Ok(Self { child, closed })
    }

    /// Waits for the command, and reaps orphans meanwhile. Returns the exit code, or 128 plus the
    /// number of the signal that ended the command.
    fn finish(self) -> Result<u8> {
        let id = i32::try_from(self.child.id())?;
        let code = loop {
            match wait().context("Cannot wait for the command")? {
                WaitStatus::Exited(pid, code) if pid.as_raw() == id => {
                    break u8::try_from(code).unwrap_or(u8::MAX);
                }
                WaitStatus::Signaled(pid, signal, _) if pid.as_raw() == id => {
                    break 128 + signal as u8;
                }
                _ => {}
            }
        };
        // Nobody ever sends: the call returns when all senders are dropped or the time is over.
        let _ = self.closed.recv_timeout(OUTPUT_DEADLINE);
        Ok(code)
    }
}

/// Opens a terminal of this size. Returns our side and the command's side.
fn terminal((rows, columns): (u16, u16)) -> Result<(File, OwnedFd)> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pair = openpty(&size, None).context("Cannot open a terminal")?;
    Ok((File::from(pair.master), pair.slave))
}

/// Writes the outside's input to the terminal.
fn type_in(mut port: File, mut decoder: Decoder, mut keyboard: File) {
    let mut chunk = vec![0; MAX_PAYLOAD];
    loop {
        while let Some(frame) = decoder.poll_frame() {
            if let Ok(ToMachine::Input(bytes)) = ToMachine::decode(&frame)
                && keyboard.write_all(&bytes).is_err()
            {
                return;
            }
        }
        match port.read(&mut chunk) {
            Ok(length @ 1..) => decoder.push(&chunk[..length]),
            _ => return,
        }
    }
}
