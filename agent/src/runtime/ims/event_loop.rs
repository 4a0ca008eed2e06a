//! The two threads of the mapping server: one serves nodes, the other writes to the store.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write as _};
use std::net::Ipv6Addr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::Socket;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{error, info};

use super::batch::{BATCH, Batch};
use super::{describe, now};
use crate::config::ImsConfig;
use crate::control::Reply;
use crate::control::report::{ImsStatus, age_ms, milliseconds};
use crate::proto::Timestamp;
use crate::proto::ims::{self, Hoa, Ims, MappingStore, Now, Record, Swapped, Write};
use crate::telemetry;
use crate::watchdog::Watchdog;

/// Batches to read before other input gets its turn.
const BATCHES_IN_TURN: usize = 16;
/// Longest sleep when no timer is armed.
const IDLE: Duration = Duration::from_secs(60);

/// Input of the serving thread, other than datagrams.
#[derive(Debug)]
pub(super) enum Input {
    /// A transaction of the store has ended.
    Stored(Stored),
    /// Another server has changed the store.
    Changed {
        /// Home address of the node.
        hoa: Hoa,
        /// What the other server stored.
        record: Record,
    },
    /// An operator asks for the status.
    Status(UnboundedSender<Reply>),
    /// An operator enrolls a node.
    Enroll {
        /// Home address of the node.
        hoa: Ipv6Addr,
        /// Generation of the key; `None`: the next generation.
        generation: Option<u32>,
        /// Channel for the answer.
        replies: UnboundedSender<Reply>,
    },
    /// The server stops.
    Stop,
}

/// Result of a transaction.
#[derive(Debug)]
pub(super) struct Stored {
    hoas: Vec<Hoa>,
    /// Duration of the transaction.
    elapsed: Duration,
    /// Outcome of each write, or why the transaction failed.
    outcome: Result<Vec<Swapped>, String>,
}

/// Sender of [`Input`]; wakes the receiving thread.
#[derive(Clone, Debug)]
pub(super) struct Inputs {
    sender: Sender<Input>,
    waker: Arc<UnixStream>,
}

/// Receiver of [`Input`]; its descriptor becomes readable when input waits.
#[derive(Debug)]
pub(super) struct InputReceiver {
    receiver: Receiver<Input>,
    woken: UnixStream,
}

impl Inputs {
    pub(super) fn new() -> io::Result<(Self, InputReceiver)> {
        let (waker, woken) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let (sender, receiver) = channel();
        let inputs = Self {
            sender,
            waker: Arc::new(waker),
        };
        Ok((inputs, InputReceiver { receiver, woken }))
    }

    pub(super) fn send(&self, input: Input) {
        // Both calls fail only after the thread has ended; a full waker has woken the thread
        // already.
        let _ = self.sender.send(input);
        let _ = (&*self.waker).write(&[0]);
    }
}

/// Writes all waiting changes in one transaction, again and again until every sender is gone.
pub(super) fn write(store: &impl MappingStore, writes: &Receiver<Vec<Write>>, inputs: &Inputs) {
    let mut failing = false;
    while let Ok(mut batch) = writes.recv() {
        while let Ok(more) = writes.try_recv() {
            batch.extend(more);
        }
        let start = Instant::now();
        let outcome = store.swap(&batch).map_err(|error| describe(&error));
        match &outcome {
            Err(reason) if !failing => {
                error!(%reason, "Updates cannot be stored and are refused; lookups go on");
            }
            Ok(_) if failing => info!("Updates can be stored again"),
            _ => {}
        }
        failing = outcome.is_err();
        inputs.send(Input::Stored(Stored {
            hoas: batch.into_iter().map(|write| write.hoa).collect(),
            elapsed: start.elapsed(),
            outcome,
        }));
    }
}

/// State of the thread that serves nodes.
pub(super) struct EventLoop {
    listen: String,
    home: String,
    store: String,
    started: Timestamp,
    socket: Socket,
    batch: Batch,
    ims: Ims,
    inputs: InputReceiver,
    writes: Sender<Vec<Write>>,
    /// Operators who wait for an enrollment, by the protocol's number of the request.
    operators: BTreeMap<u64, UnboundedSender<Reply>>,
    next_operator: u64,
    commits: u64,
    longest_commit: Duration,
    store_error: Option<String>,
    replies_lost: u64,
}

impl EventLoop {
    pub(super) fn new(
        config: &ImsConfig,
        socket: Socket,
        ims: Ims,
        inputs: InputReceiver,
        writes: Sender<Vec<Write>>,
    ) -> Self {
        Self {
            listen: config.ims.listen.to_string(),
            home: config.ims.home.to_string(),
            store: config.ims.store.display().to_string(),
            started: now().monotonic,
            socket,
            batch: Batch::new(),
            ims,
            inputs,
            writes,
            operators: BTreeMap::new(),
            next_operator: 0,
            commits: 0,
            longest_commit: Duration::ZERO,
            store_error: None,
            replies_lost: 0,
        }
    }

    /// Serves until [`Input::Stop`] arrives.
    ///
    /// # Errors
    ///
    /// The socket has become unusable.
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut watchdog = Watchdog::of_systemd();
        loop {
            let (readable, woken) = self.wait(watchdog.beat())?;
            if woken && self.take_inputs()? {
                return Ok(());
            }
            if readable {
                self.take_datagrams()?;
            }
            self.ims.handle_timeout(now());
            self.perform();
        }
    }

    /// Waits for input, at most for `most`. Returns whether there are datagrams, and whether there
    /// is other input.
    fn wait(&self, most: Duration) -> io::Result<(bool, bool)> {
        let most = most.min(IDLE);
        let wait = self
            .ims
            .poll_timeout()
            .map_or(most, |due| due.since(now().monotonic).min(most));
        // Rounded up, so that the thread does not wake before a timer is due.
        let wait = wait + Duration::from_millis(1);
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let mut polled = [
            PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.inputs.woken.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        // Reading the socket also clears a pending error.
        let [datagrams, other] = polled.map(|it| it.any().unwrap_or(false));
        Ok((datagrams, other))
    }

    fn take_datagrams(&mut self) -> io::Result<()> {
        for _ in 0..BATCHES_IN_TURN {
            let now = now();
            let ims = &mut self.ims;
            let received = self.batch.receive(&self.socket, |path, bytes| {
                ims.handle_datagram(now, path, bytes);
            });
            let count = match received {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                // An ICMPv6 error about an earlier answer, or a signal.
                Err(error) if is_passing(&error) => continue,
                Err(error) => return Err(error),
            };
            self.perform();
            if count < BATCH {
                break;
            }
        }
        Ok(())
    }

    /// Handles the input of other threads. Returns true after [`Input::Stop`].
    fn take_inputs(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 256];
        loop {
            match self.inputs.woken.read(&mut buffer) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        while let Ok(input) = self.inputs.receiver.try_recv() {
            let now = now();
            match input {
                Input::Stored(stored) => self.stored(now, stored),
                Input::Changed { hoa, record } => self.ims.handle_change(now, hoa, record),
                // A send to an operator who has left fails; so do the sends below.
                Input::Status(replies) => {
                    let _ = replies.send(Reply::ImsStatus(Box::new(self.status(now))));
                }
                Input::Enroll {
                    hoa,
                    generation,
                    replies,
                } => {
                    let request = self.next_operator;
                    self.next_operator += 1;
                    match self.ims.enroll(now, hoa, generation, request) {
                        Ok(()) => drop(self.operators.insert(request, replies)),
                        Err(error) => drop(replies.send(Reply::Error(error.to_string()))),
                    }
                }
                Input::Stop => return Ok(true),
            }
        }
        Ok(false)
    }

    fn stored(&mut self, now: Now, stored: Stored) {
        self.longest_commit = self.longest_commit.max(stored.elapsed);
        self.store_error = None;
        match stored.outcome {
            Ok(outcomes) => {
                self.commits += 1;
                for (hoa, swapped) in stored.hoas.into_iter().zip(outcomes) {
                    self.ims.handle_swapped(now, hoa, swapped);
                }
            }
            Err(reason) => {
                self.store_error = Some(reason);
                self.ims.handle_stored(now, &stored.hoas, false);
            }
        }
    }

    /// Performs the protocol's outputs.
    fn perform(&mut self) {
        let writes = self.ims.poll_writes();
        if !writes.is_empty() && self.writes.send(writes).is_err() {
            // The writing thread has panicked. Without acknowledgements nodes ask their other
            // servers.
            self.store_error = Some("The thread that writes has ended".to_owned());
        }
        while let Some(ims::Enrolled {
            request,
            generation,
        }) = self.ims.poll_enrolled()
        {
            let reply = generation.map_or_else(
                || Reply::Error("The store cannot be written; see the log".to_owned()),
                |generation| Reply::Enrolled { generation },
            );
            if let Some(operator) = self.operators.remove(&request) {
                let _ = operator.send(reply);
            }
        }
        let replies: Vec<ims::Reply> = std::iter::from_fn(|| self.ims.poll_reply()).collect();
        let mut rest = replies.as_slice();
        while !rest.is_empty() {
            let sent = match self.batch.send(&self.socket, rest) {
                Ok(sent) => sent,
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                // The node has no route or the socket no room; the node asks again.
                Err(_) => {
                    self.replies_lost += 1;
                    1
                }
            };
            rest = rest.get(sent..).unwrap_or_default();
        }
    }

    fn status(&self, now: Now) -> ImsStatus {
        let (nodes, mappings) = self.ims.counts(now.monotonic);
        let own = [
            ("commits", self.commits),
            ("replies_lost", self.replies_lost),
            ("log_lines_dropped", telemetry::dropped()),
        ];
        ImsStatus {
            listen: self.listen.clone(),
            home: self.home.clone(),
            store: self.store.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: age_ms(now.monotonic, self.started.0),
            nodes,
            mappings,
            longest_commit_ms: milliseconds(self.longest_commit),
            store_error: self.store_error.clone(),
            counters: self
                .ims
                .counters()
                .named()
                .chain(own)
                .filter(|(_, count)| *count > 0)
                .map(|(name, count)| (name.to_owned(), count))
                .collect(),
        }
    }
}

/// Returns true if the error concerns an earlier datagram and not the socket.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::Interrupted
            | ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
            | ErrorKind::NetworkDown
            | ErrorKind::PermissionDenied
    )
}
