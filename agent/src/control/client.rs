//! The operator's side of the socket: blocking, for the commands of `roamcast`.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use super::{Reply, Request};

/// Why the agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("No agent listens on {}; start it, or name its socket with --socket", path.display())]
    NoAgent {
        /// The socket.
        path: PathBuf,
    },
    /// The socket is not for this user.
    #[error("Only root may use {}; run the command as root", path.display())]
    NotRoot {
        /// The socket.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("Lost the connection to the agent on {}", path.display())]
    Lost {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection ended in the middle of an answer.
    #[error("The agent stopped in the middle of its answer; see its log")]
    Incomplete,
    /// The answer is not understood.
    #[error("The agent's answer is not understood; is it of another version than this program?")]
    Decode(#[source] serde_json::Error),
    /// The agent says no.
    #[error("{0}")]
    Refused(String),
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
    path: PathBuf,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    ///
    /// [`ClientError`]: nobody listens, or the socket is not for this user.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let path = path.to_owned();
        match UnixStream::connect(&path) {
            Ok(stream) => Ok(Self {
                stream: BufReader::with_capacity(64 * 1024, stream),
                path,
            }),
            Err(source) => Err(match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NoAgent { path }
                }
                io::ErrorKind::PermissionDenied => ClientError::NotRoot { path },
                _ => ClientError::Lost { path, source },
            }),
        }
    }

    /// Asks, and passes each reply but the last to `each`.
    ///
    /// # Errors
    ///
    /// [`ClientError`]: the connection broke, or the agent says no.
    pub fn ask(
        &mut self,
        request: &Request,
        mut each: impl FnMut(Reply),
    ) -> Result<(), ClientError> {
        let mut line = serde_json::to_vec(request).map_err(ClientError::Decode)?;
        line.push(b'\n');
        let sent = self.stream.get_mut().write_all(&line);
        // An agent that refuses the connection has closed it already; its reason can be read.
        match sent {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(self.lost(error));
            }
            _ => {}
        }
        loop {
            line.clear();
            match self.stream.read_until(b'\n', &mut line) {
                Ok(0) => return Err(ClientError::Incomplete),
                Ok(_) => {}
                Err(error) => return Err(self.lost(error)),
            }
            match serde_json::from_slice(&line).map_err(ClientError::Decode)? {
                Reply::End => return Ok(()),
                Reply::Error(reason) => return Err(ClientError::Refused(reason)),
                reply => each(reply),
            }
        }
    }

    fn lost(&self, source: io::Error) -> ClientError {
        ClientError::Lost {
            path: self.path.clone(),
            source,
        }
    }
}
