//! The agent's side of the operator's socket.
//!
//! A task for each connection reads requests, passes them to the event loop together with a channel
//! for the answer, and writes the replies. The task also cuts tables into lines of [`CHUNK_ROWS`]
//! rows and encodes them, so the event loop only hands over rows.

use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, warn};

use super::Reply;
use super::request::{Answer, MAX_REQUEST_BYTES, Request, decode};
use super::trace::TraceLine;

/// Most connections served at once; the server refuses further ones.
pub const MAX_CONNECTIONS: usize = 16;
/// Rows of a table per line.
pub const CHUNK_ROWS: usize = 512;
/// Longest silence of a connection between two requests.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time that the operator's program may take to read a line.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Lines of a trace that wait for the operator's program; the agent drops and counts further ones.
const TRACE_LINES: usize = 1024;
/// Longest time that the event loop may take for a table.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A request on its way to the event loop.
#[derive(Debug)]
pub struct ControlRequest<R> {
    /// The decoded request.
    pub request: R,
    /// Channel for the answer. The event loop ends the answer by dropping the sender. The server
    /// then adds [`Reply::End`], unless the last reply was [`Reply::Error`]. A failed send means
    /// that the operator has closed the connection.
    pub replies: mpsc::UnboundedSender<Reply>,
    /// Channel for the lines of a trace; `None` for every other request. The channel is
    /// full when the operator reads slowly and closed when the operator has left.
    pub lines: Option<mpsc::Sender<TraceLine>>,
}

/// Why the socket cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another agent answers on the socket.
    #[error("Another agent already listens on {}; stop it or set another agent.control_socket", path.display())]
    InUse {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The path names a file that is not a socket.
    #[error("{} is no socket; remove it or set another agent.control_socket", path.display())]
    NoSocket {
        /// Path of the file.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("Cannot make the socket {}", path.display())]
    Bind {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
}

/// The listening socket. Dropping the value removes the socket's file.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl ControlServer {
    /// Creates the socket with mode 0600, and its directory if the directory is missing. Replaces a
    /// socket file that a dead agent left behind. The caller must be within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`ControlError`]: another agent listens, or the file system refuses.
    pub fn bind(path: &Path) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Bind {
            path: path.to_owned(),
            source,
        };
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(failed)?;
        }
        remove_stale(path)?;
        let listener = UnixListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let inode = std::fs::symlink_metadata(path).map_err(failed)?.ino();
        Ok(Self {
            listener,
            path: path.to_owned(),
            inode,
        })
    }

    /// Serves connections until `shutdown` is ready. The caller must be within a tokio runtime.
    pub async fn serve<R: Request>(
        self,
        requests: mpsc::Sender<ControlRequest<R>>,
        shutdown: impl Future<Output = ()>,
    ) {
        let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        tokio::pin!(shutdown);
        loop {
            let accepted = tokio::select! {
                () = &mut shutdown => return,
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // The process is probably out of file descriptors. A retry at once would spin.
                    warn!(%error, "Cannot accept a connection on the operator's socket");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let permit = Arc::clone(&permits).try_acquire_owned();
            let requests = requests.clone();
            connections.spawn(async move {
                let result = match permit {
                    Ok(_permit) => serve_connection(stream, requests).await,
                    Err(_) => refuse(stream).await,
                };
                if let Err(error) = result {
                    debug!(%error, "Connection on the operator's socket ended");
                }
            });
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // Another agent may have replaced the file; only this agent's own file is removed.
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            debug!(%error, "Cannot remove the operator's socket");
        }
    }
}

fn remove_stale(path: &Path) -> Result<(), ControlError> {
    use std::os::unix::fs::FileTypeExt;

    let failed = |source| ControlError::Bind {
        path: path.to_owned(),
        source,
    };
    let file_type = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    if !file_type.is_socket() {
        return Err(ControlError::NoSocket {
            path: path.to_owned(),
        });
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed)
        }
        // A full backlog also means that an agent listens.
        Ok(_) => Err(ControlError::InUse {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(ControlError::InUse {
            path: path.to_owned(),
        }),
        Err(error) => Err(failed(error)),
    }
}

async fn refuse(stream: UnixStream) -> io::Result<()> {
    let (_, mut writer) = stream.into_split();
    let reason = format!("The agent already serves {MAX_CONNECTIONS} connections; try again");
    write_line(&mut writer, &Reply::Error(reason)).await
}

async fn serve_connection<R: Request>(
    stream: UnixStream,
    requests: mpsc::Sender<ControlRequest<R>>,
) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    let (reader, mut writer) = stream.into_split();
    if uid != 0 && uid != nix::unistd::geteuid().as_raw() {
        warn!(uid, "Refused a user on the operator's socket");
        let reason = "Only root may talk to the agent".to_owned();
        return write_line(&mut writer, &Reply::Error(reason)).await;
    }
    let mut reader = BufReader::new(reader);
    while let Some(line) = read_line(&mut reader).await? {
        let answer = match decode::<R>(&line) {
            Ok(request) if request.answer() == Answer::Trace => {
                trace(&mut reader, &mut writer, &requests, request).await?
            }
            Ok(request) => ask(&mut writer, &requests, request).await?,
            Err(reason) => Some(Reply::Error(reason)),
        };
        if let Some(last) = answer {
            write_line(&mut writer, &last).await?;
        }
        if line.len() >= MAX_REQUEST_BYTES {
            // The rest of the bytes belongs to the same request.
            break;
        }
    }
    Ok(())
}

/// Reads the next line, at most [`MAX_REQUEST_BYTES`] of it. Returns `None` at the end of the
/// connection or after [`IDLE_TIMEOUT`].
async fn read_line(reader: &mut BufReader<OwnedReadHalf>) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let limit = u64::try_from(MAX_REQUEST_BYTES).unwrap_or(u64::MAX);
    let mut limited = reader.take(limit);
    match timeout(IDLE_TIMEOUT, limited.read_until(b'\n', &mut line)).await {
        Ok(Ok(0)) | Err(_) => Ok(None),
        Ok(Ok(_)) => Ok(Some(line)),
        Ok(Err(error)) => Err(error),
    }
}

/// Passes a request on and writes its answer. Returns the last line if it is still to be written.
async fn ask<R: Request>(
    writer: &mut OwnedWriteHalf,
    requests: &mpsc::Sender<ControlRequest<R>>,
    request: R,
) -> io::Result<Option<Reply>> {
    // A command takes as long as its migration; a table has a time limit.
    let patience = match request.answer() {
        Answer::Command => Duration::MAX,
        Answer::Table | Answer::Trace => ANSWER_TIMEOUT,
    };
    let (replies, mut answer) = mpsc::unbounded_channel();
    let request = ControlRequest {
        request,
        replies,
        lines: None,
    };
    if requests.send(request).await.is_err() {
        return Ok(Some(stopping()));
    }
    loop {
        match timeout(patience, answer.recv()).await {
            Ok(Some(reply)) if reply.is_last() => return Ok(Some(reply)),
            Ok(Some(Reply::Listeners(rows))) => {
                write_rows(writer, &rows, Reply::Listeners).await?;
            }
            Ok(Some(Reply::Streams(rows))) => write_rows(writer, &rows, Reply::Streams).await?,
            Ok(Some(Reply::Relays(rows))) => {
                write_rows(writer, &rows, Reply::Relays).await?;
            }
            Ok(Some(Reply::Nodes(rows))) => write_rows(writer, &rows, Reply::Nodes).await?,
            Ok(Some(Reply::Migrations(rows))) => {
                write_rows(writer, &rows, Reply::Migrations).await?;
            }
            Ok(Some(reply)) => write_line(writer, &reply).await?,
            Ok(None) => return Ok(Some(Reply::End)),
            Err(_) => {
                let reason = "The agent is too busy to answer; try again".to_owned();
                return Ok(Some(Reply::Error(reason)));
            }
        }
    }
}

/// Passes a trace request on and writes lines until the operator or the agent ends the trace.
async fn trace<R: Request>(
    reader: &mut BufReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
    requests: &mpsc::Sender<ControlRequest<R>>,
    request: R,
) -> io::Result<Option<Reply>> {
    let (replies, mut answer) = mpsc::unbounded_channel();
    let (sender, mut lines) = mpsc::channel(TRACE_LINES);
    let request = ControlRequest {
        request,
        replies,
        lines: Some(sender),
    };
    if requests.send(request).await.is_err() {
        return Ok(Some(stopping()));
    }
    loop {
        let line = tokio::select! {
            // The agent's answer comes before the lines of the trace.
            biased;
            reply = answer.recv() => match reply {
                Some(reply) if !reply.is_last() => reply,
                last => return Ok(Some(last.unwrap_or(Reply::End))),
            },
            Some(line) = lines.recv() => Reply::Trace(line),
            // The operator has left or sends another request.
            more = reader.fill_buf() => return Ok((!more?.is_empty()).then_some(Reply::End)),
        };
        // No time limit: an operator may pause the terminal's output and resume it later.
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        writer.write_all(&bytes).await?;
    }
}

fn stopping() -> Reply {
    Reply::Error("The agent is stopping".to_owned())
}

async fn write_rows<T: Clone>(
    writer: &mut OwnedWriteHalf,
    rows: &[T],
    reply: fn(Vec<T>) -> Reply,
) -> io::Result<()> {
    for chunk in rows.chunks(CHUNK_ROWS) {
        write_line(writer, &reply(chunk.to_vec())).await?;
    }
    Ok(())
}

async fn write_line(writer: &mut OwnedWriteHalf, line: &impl Serialize) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(line)?;
    bytes.push(b'\n');
    timeout(WRITE_TIMEOUT, writer.write_all(&bytes))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests;
