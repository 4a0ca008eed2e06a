//! The thread of the gates: reads held frames, watches the queues of TAPs and writes replayed
//! frames to them.
//!
//! ```text
//!              GateCommand                 GateEvent
//!  EventLoop --------------> gates thread -----------> EventLoop
//!                              |  ^    |
//!              GATES, replayed |  |    | frames (packet socket)
//!                              v  |    v
//!                             gate  HELD     TAP's queue
//! ```
//!
//! The gates have a thread of their own because frames may arrive every 10 µs, and no other work of
//! the agent may delay a replay. [`crate::proto::handover`] makes the decisions.

mod arrival;
mod recording;
mod send_on;
mod thread;

use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::Builder;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::config::Handover;
use crate::datapath::{Datapath, DatapathError};
use crate::net::tap_queue::{TapQueueError, TapQueues};
use crate::proto::{GateCommand, GateEvent};
use crate::runtime::trace::Replays;

/// Longest wait for the thread to accept a command; normally milliseconds.
const THREAD_WAIT: Duration = Duration::from_secs(1);

/// A command for the thread, and the channel that acknowledges it.
type Message = (GateCommand, Option<mpsc::Sender<()>>);

/// Why the thread of the gates cannot start.
#[derive(Debug, thiserror::Error)]
pub enum GatesError {
    /// Kernel programs or maps failed.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// Reading the queues of TAPs failed.
    #[error(transparent)]
    TapQueue(#[from] TapQueueError),
    /// The system refuses a thread or a socket pair.
    #[error("Cannot start the thread for the handover: {0}; raise the limits of the agent's unit")]
    System(#[from] io::Error),
}

/// Handle of the thread. Dropping the handle ends the thread.
pub struct Gates {
    datapath: Datapath,
    commands: mpsc::Sender<Message>,
    /// One byte on this socket wakes the thread.
    wake: UnixStream,
    /// Reports failures of this handle to the event loop.
    failures: UnboundedSender<GateEvent>,
    events: UnboundedReceiver<GateEvent>,
}

impl Gates {
    /// Starts the thread in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// See [`GatesError`].
    pub fn start(
        datapath: &Datapath,
        config: &Handover,
        replays: Replays,
    ) -> Result<Self, GatesError> {
        let (commands, inbox) = mpsc::channel();
        let (sender, events) = unbounded_channel();
        let (wake, woken) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let thread = thread::GateThread::new(
            datapath.clone(),
            TapQueues::open()?,
            config,
            (inbox, woken),
            sender.clone(),
            replays,
        )?;
        Builder::new()
            .name("gates".to_owned())
            .spawn(move || thread.run())?;
        Ok(Self {
            datapath: datapath.clone(),
            commands,
            wake,
            failures: sender,
            events,
        })
    }

    /// Performs a command of the protocol. After [`GateCommand::Hold`] the gate holds when this
    /// function returns.
    pub fn perform(&mut self, command: GateCommand) {
        let GateCommand::Hold { ifindex } = command else {
            return self.tell((command, None));
        };
        // The thread must know the arrival before the gate holds its first frame.
        self.tell_and_wait(ifindex, command);
        if let Err(error) = self.datapath.gate_hold(ifindex) {
            tracing::warn!(
                ifindex,
                error = &error as &dyn std::error::Error,
                "A TAP has no gate; its VM may lose and double packets"
            );
            self.tell((GateCommand::Clear { ifindex }, None));
            let _ = self.failures.send(GateEvent::NotHeld { ifindex });
        }
    }

    /// Handles the removal of a TAP. When this function returns, the thread has read the gate's
    /// counters, and the datapath may remove them.
    pub fn removed(&mut self, ifindex: u32) {
        self.tell_and_wait(ifindex, GateCommand::Clear { ifindex });
    }

    fn tell_and_wait(&mut self, ifindex: u32, command: GateCommand) {
        let (ready, is_ready) = mpsc::channel();
        self.tell((command, Some(ready)));
        if is_ready.recv_timeout(THREAD_WAIT).is_err() {
            tracing::warn!(
                ifindex,
                "The thread of the gates is late; packets may be lost"
            );
        }
    }

    fn tell(&mut self, message: Message) {
        // Both calls fail only after the thread has ended with the agent; a full pipe wakes the
        // thread too.
        let _ = self.commands.send(message);
        let _ = self.wake.write(&[0]);
    }

    /// Waits for the next event of a gate. Cancel safe: no event is lost.
    pub async fn next(&mut self) -> Option<GateEvent> {
        self.events.recv().await
    }
}
