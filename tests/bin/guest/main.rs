//! PID 1 of the lab's guests: sets the machine up, then serves the host's requests.
//!
//! With the path of a Unix socket as argument, the program serves the same protocol on that socket
//! without setting anything up. As `guest echo` the program is the application [`mod@echo`].

mod boot;
mod echo;
mod outbox;
mod programs;
mod receive;
mod stalls;

use std::{
    collections::{HashMap, VecDeque},
    fs,
    fs::File,
    io::Read,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use lab::{
    guest::wire::{Answer, Command, FromGuest, Reply, Request, Status, frame::Decoder},
    probe::counters,
};

use crate::{outbox::Outbox, programs::Programs, receive::Receivers, stalls::Stalls};

/// Number of replies kept for requests that the host repeats.
const REMEMBERED_REPLIES: usize = 256;
/// Silence after which the guest reports that it is alive.
const ALIVE_INTERVAL: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some((name, rest)) = arguments.split_first()
        && name == "echo"
    {
        return match echo::run(rest) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("guest: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let result = match arguments.first() {
        Some(path) => UnixStream::connect(path)
            .with_context(|| format!("Cannot connect to {path}"))
            .and_then(|stream| serve(File::from(OwnedFd::from(stream)))),
        None => boot::boot().and_then(serve),
    };
    if let Err(error) = result {
        eprintln!("guest: {error:#}");
    }
    // The end of PID 1 would cause a kernel panic, and the panic says nothing about the cause.
    if std::process::id() == 1 {
        boot::power_off();
    }
    ExitCode::SUCCESS
}

/// Serves requests from the control channel until the channel ends.
fn serve(port: File) -> Result<()> {
    let outbox = Outbox::new(port.try_clone()?);
    let boot_id = read_line("/proc/sys/kernel/random/boot_id");
    outbox.send(&FromGuest::Hello(boot_id))?;
    std::thread::spawn({
        let outbox = Arc::clone(&outbox);
        move || {
            loop {
                std::thread::sleep(ALIVE_INTERVAL);
                if outbox.was_idle() {
                    outbox.send_or_log(&FromGuest::Alive);
                }
            }
        }
    });
    let mut server = Server {
        programs: Programs::new(Arc::clone(&outbox)),
        receivers: Receivers::new(Arc::clone(&outbox)),
        stalls: Stalls::new(Arc::clone(&outbox)),
        replies: HashMap::new(),
        order: VecDeque::new(),
        outbox,
    };
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; 65_536];
    let mut port = port;
    loop {
        let length = port
            .read(&mut buffer)
            .context("Cannot read the control channel")?;
        if length == 0 {
            // A virtio-serial port reads as ended while its host side is disconnected.
            if std::process::id() != 1 {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        decoder.push(&buffer[..length]);
        while let Some(frame) = decoder.poll_frame() {
            if let Some(request) = Request::decode(&frame) {
                server.handle(request)?;
            }
        }
    }
}

struct Server {
    outbox: Arc<Outbox>,
    programs: Programs,
    receivers: Receivers,
    stalls: Stalls,
    /// Sent replies by request id; `order` has the ids from oldest to newest.
    replies: HashMap<u64, Reply>,
    order: VecDeque<u64>,
}

impl Server {
    fn handle(&mut self, request: Request) -> Result<()> {
        if let Command::Resend { from, to } = request.command {
            self.outbox.resend(from, to);
            return Ok(());
        }
        if let Some(reply) = self.replies.get(&request.id) {
            return self.outbox.send(&FromGuest::Reply(reply.clone()));
        }
        let result = self.perform(request.id, request.command);
        let reply = Reply {
            id: request.id,
            result: result.map_err(|error| format!("{error:#}")),
        };
        self.replies.insert(request.id, reply.clone());
        self.order.push_back(request.id);
        if self.order.len() > REMEMBERED_REPLIES
            && let Some(oldest) = self.order.pop_front()
        {
            self.replies.remove(&oldest);
        }
        self.outbox.send(&FromGuest::Reply(reply))
    }

    fn perform(&mut self, id: u64, command: Command) -> Result<Answer> {
        match command {
            Command::Run { program, args } => self.programs.start(id, &program, &args)?,
            Command::Terminate { run } => self.programs.terminate(run)?,
            Command::StartReceiver { receiver, config } => {
                self.receivers.start(receiver, &config)?;
            }
            Command::StopReceiver { receiver } => self.receivers.stop(receiver)?,
            Command::WatchStalls => self.stalls.watch(),
            Command::Status => return Ok(Answer::Status(self.status())),
            Command::Resend { .. } => {}
        }
        Ok(Answer::Done)
    }

    fn status(&self) -> Status {
        let uptime = read_line("/proc/uptime");
        let seconds: f64 = uptime
            .split(' ')
            .next()
            .and_then(|text| text.parse().ok())
            .unwrap_or_default();
        Status {
            boot_id: read_line("/proc/sys/kernel/random/boot_id"),
            kernel: read_line("/proc/sys/kernel/osrelease"),
            uptime_ms: (seconds * 1000.0) as u64,
            receivers: self.receivers.status(),
            counters: counters::here(),
        }
    }
}

fn read_line(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}
