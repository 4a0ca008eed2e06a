//! A connection that is up: a task that reads and writes its frames.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::signal::{DecodeError, PeerMessage};
use futures::stream::{SplitSink, SplitStream};
use futures::{SinkExt, StreamExt};
use rustls_pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsStream;
use tokio_util::codec::LengthDelimitedCodecError;
use tokio_util::sync::CancellationToken;

use super::command::Command;
use super::counters::Refusal;
use super::{FromPeer, HANDSHAKE_TIMEOUT, PeerEventSender, Shared};
use crate::net::frames::{Frames, Verdict};
use crate::net::tls::Ended;
use crate::proto::PeerEvent;
use crate::role::{Forbidden, Role};

type Stream = Frames<TlsStream<TcpStream>>;

/// Most frames in the send queue.
const MAX_QUEUED_FRAMES: usize = 256;
/// Most bytes in the send queue: four of the longest frames.
const MAX_QUEUED_BYTES: usize = 4 * common::signal::MAX_FRAME_BYTES;

/// Interval between checks of the peer's certificate.
const CERTIFICATE_LOOK: Duration = Duration::from_secs(3);

/// Handle of a connection's task. Dropping the handle closes the connection.
#[derive(Debug)]
pub(super) struct Connection {
    /// Unique among the connections and dialing attempts of this process.
    pub(super) id: u64,
    /// Whether this agent dialed.
    pub(super) dialed: bool,
    /// Time at which the connection came up.
    pub(super) since: Instant,
    queue: mpsc::Sender<Vec<u8>>,
    queued_bytes: Arc<AtomicUsize>,
    close: CancellationToken,
}

/// Parameters of the task.
pub(super) struct Params {
    /// Becomes [`Connection::id`].
    pub(super) id: u64,
    /// Key of the peer in the manager: DNS name, or the identifier of a relay.
    pub(super) peer: String,
    /// Role in the peer's certificate.
    pub(super) role: Role,
    /// Address that the peer dialed from; `None` if this agent dialed.
    pub(super) source: Option<IpAddr>,
}

impl Connection {
    /// Starts the task.
    pub(super) fn start(
        shared: Arc<Shared>,
        params: Params,
        stream: Stream,
        commands: mpsc::UnboundedSender<Command>,
        events: PeerEventSender,
    ) -> Self {
        let (queue, outgoing) = mpsc::channel(MAX_QUEUED_FRAMES);
        let queued_bytes = Arc::new(AtomicUsize::new(0));
        let close = shared.stop.child_token();
        let connection = Self {
            id: params.id,
            dialed: params.source.is_none(),
            since: Instant::now(),
            queue,
            queued_bytes: Arc::clone(&queued_bytes),
            close: close.clone(),
        };
        tokio::spawn(async move {
            let (id, peer) = (params.id, params.peer.clone());
            tokio::select! {
                () = close.cancelled() => {}
                reason = serve(&shared, params, stream, outgoing, &queued_bytes, events) => {
                    let _ = commands.send(Command::Closed { peer, id, reason });
                }
            }
        });
        connection
    }

    /// Appends a frame to the send queue.
    ///
    /// # Errors
    ///
    /// [`NotReading`] if the queue is full: the peer does not read its frames.
    pub(super) fn send(&self, bytes: Vec<u8>) -> Result<(), NotReading> {
        let length = bytes.len();
        let queued = self.queued_bytes.fetch_add(length, Ordering::Relaxed);
        if queued.saturating_add(length) > MAX_QUEUED_BYTES {
            return Err(NotReading);
        }
        match self.queue.try_send(bytes) {
            Err(mpsc::error::TrySendError::Full(_)) => Err(NotReading),
            // The queue is closed if the task has ended; the task reports the end itself.
            Ok(()) | Err(mpsc::error::TrySendError::Closed(_)) => Ok(()),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close.cancel();
    }
}

/// The send queue is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NotReading;

/// Sends a final verdict frame with the reason of a refusal, and closes.
pub(super) async fn refuse<S>(frames: Frames<S>, reason: String)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    say_last(frames, Verdict::Refused(reason)).await;
}

/// Sends a verdict frame and closes.
pub(super) async fn say_last<S>(mut frames: Frames<S>, verdict: Verdict)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let _ = timeout(HANDSHAKE_TIMEOUT, async {
        frames.send(verdict.encode()).await?;
        SinkExt::<Bytes>::close(&mut frames).await
    })
    .await;
}

/// Reads and writes until one direction ends; returns the reason as a sentence.
async fn serve(
    shared: &Shared,
    params: Params,
    mut stream: Stream,
    outgoing: mpsc::Receiver<Vec<u8>>,
    queued_bytes: &AtomicUsize,
    events: PeerEventSender,
) -> String {
    let peer = &params.peer;
    if params.source.is_some()
        && let Err(error) = stream.send(Verdict::Accepted.encode()).await
    {
        return lost(peer, &error);
    }
    let (_, tls) = stream.get_ref().get_ref();
    let chain = tls.peer_certificates().unwrap_or_default().to_vec();
    let (sink, stream) = stream.split();
    tokio::select! {
        reason = read(shared, &params, stream, &events) => reason,
        error = write(sink, outgoing, queued_bytes) => lost(peer, &error),
        reason = certificate_ends(shared, peer, &chain) => reason,
    }
}

/// Waits until the peer's certificate is no longer valid.
async fn certificate_ends(
    shared: &Shared,
    peer: &str,
    chain: &[CertificateDer<'static>],
) -> String {
    loop {
        sleep(CERTIFICATE_LOOK).await;
        let (refusal, what) = match shared.tls().ended(chain) {
            None => continue,
            Some(Ended::Expired) => (Refusal::Expired, "has expired"),
            Some(Ended::Revoked) => (Refusal::Revoked, "was revoked"),
        };
        shared.refuse(peer, refusal, "while it was connected");
        return format!("The certificate of `{peer}` {what}; give it another one");
    }
}

async fn read(
    shared: &Shared,
    params: &Params,
    mut stream: SplitStream<Stream>,
    events: &PeerEventSender,
) -> String {
    let peer = &params.peer;
    let misbehaved = |refusal, detail: &str| {
        if let Some(source) = params.source {
            shared.admission().failed(source, Instant::now());
        }
        shared.refuse(peer, refusal, detail);
    };
    let place = Arc::new(Semaphore::new(1));
    let mut first = true;
    loop {
        let taken = Arc::clone(&place).acquire_owned().await;
        let bytes = match stream.next().await {
            Some(Ok(bytes)) => bytes,
            Some(Err(error)) if is_oversized(&error) => {
                misbehaved(Refusal::OversizedFrame, "");
                return format!("Agent `{peer}` sent a frame that is too long; update both agents");
            }
            Some(Err(error)) => return lost(peer, &error),
            None => return format!("Agent `{peer}` closed the connection"),
        };
        if let Err(Forbidden { message }) = params.role.may_send(shared.role, &bytes) {
            let (theirs, ours) = (params.role, shared.role);
            misbehaved(Refusal::ForbiddenMessage, message);
            return format!(
                "`{peer}` sent {message}, which is not for one of the role {theirs} to send to one of the role {ours}"
            );
        }
        // A first frame that is no message at all comes from another program. The protocol answers
        // a message of another version or kind.
        if first
            && let Err(DecodeError::Malformed | DecodeError::TooLong { .. }) =
                PeerMessage::decode(&bytes)
        {
            misbehaved(Refusal::MalformedFrame, "");
            return format!("Agent `{peer}` does not speak the signalling protocol; update it");
        }
        first = false;
        let event = FromPeer {
            peer: peer.clone(),
            event: PeerEvent::Frame(bytes),
            _place: taken.ok(),
        };
        if events.send(event).await.is_err() {
            return format!("The connection to agent `{peer}` is no longer needed");
        }
    }
}

async fn write(
    mut sink: SplitSink<Stream, Bytes>,
    mut outgoing: mpsc::Receiver<Vec<u8>>,
    queued_bytes: &AtomicUsize,
) -> io::Error {
    while let Some(bytes) = outgoing.recv().await {
        let length = bytes.len();
        let sent = sink.send(Bytes::from(bytes)).await;
        queued_bytes.fetch_sub(length, Ordering::Relaxed);
        if let Err(error) = sent {
            return error;
        }
    }
    io::ErrorKind::BrokenPipe.into()
}

fn is_oversized(error: &io::Error) -> bool {
    error
        .get_ref()
        .and_then(|error| error.downcast_ref::<LengthDelimitedCodecError>())
        .is_some()
}

fn lost(peer: &str, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
            format!("Agent `{peer}` broke the connection")
        }
        _ => format!("The connection to agent `{peer}` is lost: {error}"),
    }
}
