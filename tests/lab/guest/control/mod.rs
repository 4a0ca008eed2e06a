//! The host's side of the control channel to a guest.
//!
//! Each VM host has a socket, and the QEMU on a host connects to the socket of that host. The
//! socket on which a frame arrives therefore shows where the guest runs. During a migration both
//! QEMUs are connected, and only the QEMU with the running guest sends.
//!
//! The switch-over of a migration may cut a frame. The host requests missing frames again, by
//! number, and repeats each request until the guest answers.

mod received;
mod state;
#[cfg(test)]
mod tests;

use std::{
    io::Read as _,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};

pub use self::state::{ChannelStats, TransportAt};
use self::state::{Connection, State};
use super::wire::{Answer, Command, FromGuest, ReceiverConfig, Request, Status, frame::Decoder};
use crate::{probe::clock, wait};

/// Time without an answer after which the host repeats a request.
const RETRY_INTERVAL: Duration = Duration::from_millis(300);
/// Interval at which blocked threads check whether the channel is closed.
const STOP_CHECK: Duration = Duration::from_millis(200);
/// Deadline of requests that a live guest answers at once.
const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// The socket to which the QEMU of one VM host connects.
#[derive(Clone, Debug)]
pub struct HostSocket {
    /// Name of the VM host, e.g. `vms1`.
    pub host: String,
    /// Path of the socket as this process sees it. [`Control::listen`] replaces an old socket
    /// there.
    pub path: PathBuf,
}

/// Host's end of a guest's control channel. Clones share the channel.
#[derive(Clone)]
pub struct Control {
    inner: Arc<Inner>,
    /// Closes the channel when the last clone is dropped. The threads hold only `inner`.
    _closer: Arc<Closer>,
}

struct Closer(Arc<Inner>);

impl Drop for Closer {
    fn drop(&mut self) {
        self.0.is_closed.store(true, Relaxed);
        for socket in &self.0.sockets {
            let _ = std::fs::remove_file(&socket.path);
        }
    }
}

pub(in crate::guest) struct Inner {
    sockets: Vec<HostSocket>,
    is_closed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    /// Listens on the sockets of all VM hosts.
    ///
    /// # Errors
    ///
    /// When a socket cannot be bound.
    pub fn listen(sockets: &[HostSocket]) -> Result<Self> {
        let state = State {
            // Another process may have used the same guest before. The ids start at the current
            // time and are therefore unique.
            next_request: clock::now_ns(),
            ..State::default()
        };
        let inner = Arc::new(Inner {
            sockets: sockets.to_vec(),
            is_closed: AtomicBool::new(false),
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let mut listeners = Vec::new();
        for socket in sockets {
            let _ = std::fs::remove_file(&socket.path);
            let listener = UnixListener::bind(&socket.path)
                .with_context(|| format!("Cannot listen on {}", socket.path.display()))?;
            listener.set_nonblocking(true)?;
            listeners.push(listener);
        }
        for (host, listener) in listeners.into_iter().enumerate() {
            let inner = Arc::clone(&inner);
            thread::spawn(move || inner.accept(host, &listener));
        }
        Ok(Self {
            _closer: Arc::new(Closer(Arc::clone(&inner))),
            inner,
        })
    }

    /// Waits until the guest answers. Returns the name of the VM host on which the guest runs.
    ///
    /// # Errors
    ///
    /// When the guest does not answer within `deadline`.
    pub fn wait_ready(&self, deadline: Duration) -> Result<String> {
        self.request_within(Command::Status, deadline)
            .context("The guest does not come up")?;
        self.host()
            .context("The guest answered without a connection")
    }

    /// Returns the name of the VM host from which the last frame arrived; `None` before the first
    /// frame.
    pub fn host(&self) -> Option<String> {
        let host = self.inner.lock().host?;
        self.inner
            .sockets
            .get(host)
            .map(|socket| socket.host.clone())
    }

    /// Returns the time since the last frame; `None` before the first frame. A running guest sends
    /// a frame at least every 100 ms.
    pub fn silence(&self) -> Option<Duration> {
        self.inner.lock().last_frame.map(|last| last.elapsed())
    }

    /// Waits until a frame arrives from the named VM host.
    ///
    /// # Errors
    ///
    /// When no frame arrives from there within `deadline`.
    pub fn wait_host(&self, host: &str, deadline: Duration) -> Result<()> {
        let deadline = wait::end_after(deadline);
        let index = self
            .inner
            .sockets
            .iter()
            .position(|socket| socket.host == host);
        let index = index.with_context(|| format!("No socket belongs to VM host {host}"))?;
        let is_there = |state: &mut State| (state.host == Some(index)).then_some(());
        match self.inner.wait_until(deadline, is_there) {
            Some(()) => Ok(()),
            None => bail!(
                "The guest did not come to {host}; it runs on {:?}",
                self.host()
            ),
        }
    }

    /// Requests the guest's [`Status`].
    ///
    /// # Errors
    ///
    /// When the guest does not answer.
    pub fn status(&self) -> Result<Status> {
        match self.request(Command::Status)? {
            Answer::Status(status) => Ok(status),
            other => bail!("The guest answered {other:?} when asked for its status"),
        }
    }

    /// Starts a receiver. Returns when the receiver has joined all its addresses. Discards the
    /// packets of an earlier receiver with the same number.
    ///
    /// # Errors
    ///
    /// When a join is refused, the number is in use, or the guest does not answer.
    pub fn start_receiver(&self, receiver: u16, config: ReceiverConfig) -> Result<()> {
        self.inner.lock().forget_receiver(receiver);
        self.request(Command::StartReceiver { receiver, config })
            .map(drop)
    }

    /// Stops a receiver. Returns when the receiver has left its addresses.
    ///
    /// # Errors
    ///
    /// When there is no such receiver, or the guest does not answer.
    pub fn stop_receiver(&self, receiver: u16) -> Result<()> {
        self.request(Command::StopReceiver { receiver }).map(drop)
    }

    /// Makes the guest speak MLD version 1 or 2 on an interface. Version 0 leaves the choice to the
    /// guest's kernel.
    ///
    /// # Errors
    ///
    /// When there is no such interface, or the guest does not answer.
    pub fn force_mld_version(&self, interface: &str, version: u8) -> Result<()> {
        let script =
            format!("echo {version} > /proc/sys/net/ipv6/conf/{interface}/force_mld_version");
        self.run("sh", &["-c", &script], REQUEST_DEADLINE)?
            .into_success()
            .map(drop)
    }

    /// Returns the counters of the channel's errors.
    pub fn stats(&self) -> ChannelStats {
        let state = self.inner.lock();
        ChannelStats {
            missing: state.missing.len() as u64,
            ..state.stats
        }
    }

    /// Sends a command and waits for its answer.
    ///
    /// # Errors
    ///
    /// When the guest refuses the command, or does not answer within half a minute.
    pub fn request(&self, command: Command) -> Result<Answer> {
        self.request_within(command, REQUEST_DEADLINE)
    }

    fn request_within(&self, command: Command, deadline: Duration) -> Result<Answer> {
        let id = self.inner.new_id();
        self.request_as(id, command, deadline)
    }

    pub(super) fn request_as(
        &self,
        id: u64,
        command: Command,
        deadline: Duration,
    ) -> Result<Answer> {
        let text = format!("{command:?}");
        let frame = Request { id, command }.to_frame()?;
        let deadline = wait::end_after(deadline);
        loop {
            let attempt_deadline = deadline.min(Instant::now() + RETRY_INTERVAL);
            self.inner.lock().write_all(&frame);
            let take_reply = |state: &mut State| state.replies.remove(&id);
            if let Some(reply) = self.inner.wait_until(attempt_deadline, take_reply) {
                return reply
                    .result
                    .map_err(|error| anyhow!("The guest refused: {error}"));
            }
            if Instant::now() >= deadline {
                bail!("The guest does not answer to {text}");
            }
        }
    }

    pub(super) fn inner(&self) -> &Inner {
        &self.inner
    }
}

impl Inner {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn new_id(&self) -> u64 {
        let mut state = self.lock();
        state.next_request += 1;
        state.next_request
    }

    /// Waits until `condition` returns a value. Returns `None` at the deadline.
    pub(super) fn wait_until<T>(
        &self,
        deadline: Instant,
        mut condition: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        let mut state = self.lock();
        loop {
            if let Some(found) = condition(&mut state) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn accept(self: &Arc<Self>, host: usize, listener: &UnixListener) {
        while !self.is_closed.load(Relaxed) {
            match listener.accept() {
                Ok((stream, _peer)) => {
                    let inner = Arc::clone(self);
                    thread::spawn(move || inner.read(host, stream));
                }
                Err(_) => thread::sleep(STOP_CHECK / 10),
            }
        }
    }

    fn read(&self, host: usize, mut stream: UnixStream) {
        let Some(id) = self.add_connection(&stream) else {
            return;
        };
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 65_536];
        while !self.is_closed.load(Relaxed) {
            let length = match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            let host_ns = clock::now_ns();
            let skipped = decoder.skipped;
            decoder.push(&buffer[..length]);
            let mut state = self.lock();
            while let Some(frame) = decoder.poll_frame() {
                state.host = Some(host);
                state.last_frame = Some(Instant::now());
                if let Some(message) = FromGuest::decode(&frame)
                    && state.admit(&frame, &message, host, host_ns)
                {
                    state.handle(&frame, message, host_ns);
                }
            }
            state.stats.skipped_bytes += decoder.skipped - skipped;
            state.ask_again(id);
            drop(state);
            self.changed.notify_all();
        }
        self.lock()
            .connections
            .retain(|connection| connection.id != id);
    }

    fn add_connection(&self, stream: &UnixStream) -> Option<u64> {
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(STOP_CHECK)).ok()?;
        // A QEMU whose guest does not run reads nothing, and a write to it must not block writes to
        // the other QEMU.
        stream.set_write_timeout(Some(STOP_CHECK)).ok()?;
        let stream = stream.try_clone().ok()?;
        let mut state = self.lock();
        let id = state.next_connection;
        state.next_connection += 1;
        state.connections.push(Connection { id, stream });
        Some(id)
    }
}
