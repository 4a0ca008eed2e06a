//! The gates of TAPs at work: one thread that reads what is held, watches the queues of TAPs and
//! puts replayed frames into them.
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
//! A thread of its own, because between a frame and the next there may be 10 us, and nothing that
//! the agent does else may come between. What it decides is in [`crate::proto::handover`].

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

/// The thread takes a command in within milliseconds.
const THREAD_WAIT: Duration = Duration::from_secs(1);

/// A command for the thread, and whom to tell that it was taken in.
type Message = (GateCommand, Option<mpsc::Sender<()>>);

/// Why there is no thread for the gates.
#[derive(Debug, thiserror::Error)]
pub enum GatesError {
    /// Kernel programs and maps.
    #[error(transparent)]
    Datapath(#[from] DatapathError),
    /// Queues of TAPs.
    #[error(transparent)]
    TapQueue(#[from] TapQueueError),
    /// The system refuses something basic.
    #[error("Cannot start the thread for the handover: {0}; raise the limits of the agent's unit")]
    System(#[from] io::Error),
}

/// Handle of the thread, which ends with it.
pub struct Gates {
    datapath: Datapath,
    commands: mpsc::Sender<Message>,
    /// A byte in it wakes the thread.
    wake: UnixStream,
    /// For what fails here.
    failures: UnboundedSender<GateEvent>,
    events: UnboundedReceiver<GateEvent>,
}

impl Gates {
    /// Starts the thread, in the network namespace of the calling one.
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

    /// Does what the protocol wants. A gate that is to hold, holds when this returns.
    pub fn perform(&mut self, command: GateCommand) {
        let GateCommand::Hold { ifindex } = command else {
            return self.tell((command, None));
        };
        // The thread is to know whose frames they are before the first one is held.
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

    /// A TAP is gone. What its VM has had is read when this returns: what counts it may be let go.
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
        // Both fail only when the thread has ended, with the agent; a full pipe wakes it too.
        let _ = self.commands.send(message);
        let _ = self.wake.write(&[0]);
    }

    /// Waits for what becomes of gates. Can be cancelled without losing anything.
    pub async fn next(&mut self) -> Option<GateEvent> {
        self.events.recv().await
    }
}
