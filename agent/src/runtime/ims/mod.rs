//! The running mapping server: connects its protocol to the network, the store and the operator.
//!
//! ```text
//!               thread `ims`                              thread `ims-store`
//!   socket ---> handle_datagram -> poll_writes ---------> one transaction of all that waits
//!          <--- poll_reply      <- handle_swapped <------ and one fsync
//!                     ^            handle_change <------- what another server stored
//!   operator (tokio) -'
//! ```
//!
//! One thread owns the protocol and the socket, and moves up to 64 datagrams per system call. A
//! lookup never waits for the disk: a second thread writes, and the updates of the next transaction
//! gather meanwhile.

mod batch;
mod event_loop;
pub mod keyfile;
pub mod operator;
pub mod secret;
mod socket;
pub mod store;

use std::io;
use std::net::SocketAddrV6;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use linux::random;
use tokio::sync::{mpsc, oneshot};

use crate::clock;
use crate::config::ImsConfig;
use crate::control::server::{ControlError, ControlRequest, ControlServer};
use crate::control::{Reply, request};
use crate::proto::ims::{Ims, MappingStore, Now};
use crate::shutdown::Shutdown;
use event_loop::{EventLoop, Input, Inputs};
use secret::SecretError;
use store::{Store, StoreError};

/// Operators' requests that may wait for the server.
const CONTROL_REQUESTS: usize = 16;

/// Why the server cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum ImsError {
    /// Reading the file with the secret failed.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Opening or reading the store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The operator's socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The socket for nodes failed.
    #[error("Cannot listen on {address} (UDP)")]
    Listen {
        /// Address and port to which the socket was to be bound.
        address: SocketAddrV6,
        /// Error of the system call.
        source: io::Error,
    },
    /// A system call that every server needs failed.
    #[error("The system refuses {what}")]
    System {
        /// Refused operation, as the error sentence names it.
        what: &'static str,
        /// Error of the system call.
        source: io::Error,
    },
    /// The thread that serves nodes has ended.
    #[error("The thread that serves nodes has ended")]
    Ended(#[source] io::Error),
}

/// Runs the server until a signal stops it. Every acknowledged update is in the store.
///
/// # Errors
///
/// See [`ImsError`].
pub async fn run(config: ImsConfig) -> Result<(), ImsError> {
    let refused = |what| move |source| ImsError::System { what, source };
    let mut shutdown = Shutdown::new().map_err(refused("signal handlers"))?;
    let secret = secret::load(&config.ims.secret)?;
    let store = Arc::new(Store::open(&config.ims.store)?);
    let control = ControlServer::bind(&config.ims.control_socket)?;
    let (inputs, receiver) = Inputs::new().map_err(refused("a socket pair"))?;
    let mut ims = Ims::new(config.protocol(), secret, random::entropy());
    watch(&*store, &inputs)?;
    restore(&mut ims, &*store)?;
    let address = config.ims.listen;
    let socket = socket::bind(address).map_err(|source| ImsError::Listen { address, source })?;

    let (writes, written) = std::sync::mpsc::channel();
    let writer = {
        let (store, inputs) = (Arc::clone(&store), inputs.clone());
        std::thread::Builder::new()
            .name("ims-store".to_owned())
            .spawn(move || event_loop::write(&*store, &written, &inputs))
            .map_err(refused("a thread"))?
    };
    let (end, mut ended) = oneshot::channel();
    let event_loop = EventLoop::new(&config, socket, ims, receiver, writes);
    let server = std::thread::Builder::new()
        .name("ims".to_owned())
        // The send fails if this function has returned.
        .spawn(move || drop(end.send(event_loop.run())))
        .map_err(refused("a thread"))?;

    let (control_sender, mut requests) = mpsc::channel(CONTROL_REQUESTS);
    tokio::spawn(control.serve(control_sender, std::future::pending()));
    tracing::info!(listen = %address, home = %config.ims.home, "Started");
    // Without systemd nobody listens, which is no failure.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    loop {
        tokio::select! {
            Some(request) = requests.recv() => handle_control(request, &inputs, &store),
            result = &mut ended => {
                let lost = Err(io::Error::other("it has panicked"));
                return result.unwrap_or(lost).map_err(ImsError::Ended);
            }
            signal = shutdown.recv() => {
                tracing::info!(signal, "Stopping");
                break;
            }
        }
    }
    inputs.send(Input::Stop);
    // The last user closes the store, so that the next start need not repair it.
    let stopped = tokio::task::spawn_blocking(move || (server.join(), writer.join())).await;
    if stopped.is_err() {
        tracing::debug!("A thread was not waited for");
    }
    Ok(())
}

/// Passes on what other servers store.
fn watch<S: MappingStore>(store: &S, inputs: &Inputs) -> Result<(), S::Error> {
    let inputs = inputs.clone();
    store.watch(move |hoa, record| inputs.send(Input::Changed { hoa, record }))
}

fn restore<S: MappingStore>(ims: &mut Ims, store: &S) -> Result<(), S::Error> {
    let (start, now) = (Instant::now(), now());
    let mut records = Vec::new();
    store.load(|hoa, record| records.push((hoa, record)))?;
    ims.restore(now, records);
    let (nodes, mappings) = ims.counts(now.monotonic);
    tracing::info!(nodes, mappings, elapsed = ?start.elapsed(), "Store is read");
    Ok(())
}

fn handle_control(request: ControlRequest<request::Ims>, inputs: &Inputs, store: &Arc<Store>) {
    let replies = request.replies;
    match request.request {
        request::Ims::Status => inputs.send(Input::Status(replies)),
        request::Ims::Enroll { hoa, generation } => inputs.send(Input::Enroll {
            hoa,
            generation,
            replies,
        }),
        request::Ims::Nodes => {
            let store = Arc::clone(store);
            // A hundred thousand nodes take time, so the list is made on a thread for blocking
            // work.
            tokio::task::spawn_blocking(move || {
                let reply = operator::rows(&*store, now().wall_ms)
                    .map_or_else(|error| Reply::Error(describe(&error)), Reply::Nodes);
                // The send fails if the operator has left.
                let _ = replies.send(reply);
            });
        }
    }
}

/// Returns an error with its causes in one sentence.
fn describe(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |error| error.source())
        .fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Returns the time on both clocks.
fn now() -> Now {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
    Now {
        monotonic: clock::now(),
        wall_ms: since_1970.map_or(0, |it| u64::try_from(it.as_millis()).unwrap_or(u64::MAX)),
    }
}
