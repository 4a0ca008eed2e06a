//! The operator's side of the socket: blocking, for the commands of `roamcast`.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use common::text::{Escaped, is_plain_text};
use serde_json::Value;

use super::command::CommandError;
use super::{Reply, Request};

/// Longest line that can be the last of an answer, bytes.
const MAX_LAST_BYTES: usize = super::MAX_REQUEST_BYTES;

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
        self.ask_lines(request, |line| {
            each(decode(line)?);
            Ok::<_, ClientError>(())
        })
    }

    /// Asks, and passes each reply but the last to `each`, until that fails.
    ///
    /// # Errors
    ///
    /// [`CommandError`]: as [`Client::ask`], or what `each` says.
    pub fn follow(
        &mut self,
        request: &Request,
        mut each: impl FnMut(Reply) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        self.ask_lines(request, |line| each(decode(line)?))
    }

    /// The connection once more, to end it from another thread.
    ///
    /// # Errors
    ///
    /// [`ClientError::Lost`].
    pub fn handle(&self) -> Result<UnixStream, ClientError> {
        let stream = self.stream.get_ref().try_clone();
        stream.map_err(|source| self.lost(source))
    }

    /// Asks for a table and writes its rows to `out` as one JSON array, as the agent encoded
    /// them: tens of thousands of rows need not be understood to be shown.
    ///
    /// # Errors
    ///
    /// [`CommandError`]: as [`Client::ask`], or `out` cannot be written.
    pub fn copy_rows(
        &mut self,
        request: &Request,
        out: &mut impl Write,
    ) -> Result<(), CommandError> {
        let prefix: &[u8] = match request {
            Request::Listeners => br#"{"reply":"listeners","data":["#,
            Request::Streams => br#"{"reply":"streams","data":["#,
            Request::Migrations => br#"{"reply":"migrations","data":["#,
            Request::Relays => br#"{"reply":"relays","data":["#,
            Request::Status
            | Request::Trace(_)
            | Request::Nodes
            | Request::Enroll { .. }
            | Request::Migrate { .. }
            | Request::Abort { .. }
            | Request::Prepare { .. } => {
                return Err(CommandError::Unexpected);
            }
        };
        let mut separator: &[u8] = b"[";
        self.ask_lines(request, |line| {
            let rows = line
                .strip_prefix(prefix)
                .and_then(|line| line.strip_suffix(b"]}\n"))
                .ok_or(CommandError::Unexpected)?;
            if !rows.is_empty() {
                out.write_all(std::mem::replace(&mut separator, b","))?;
                out.write_all(rows)?;
            }
            Ok::<_, CommandError>(())
        })?;
        out.write_all(if separator == b"[" { b"[]\n" } else { b"]\n" })?;
        Ok(())
    }

    /// Asks, and passes each line but the last to `each`.
    fn ask_lines<E: From<ClientError>>(
        &mut self,
        request: &Request,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut line = serde_json::to_vec(request).map_err(ClientError::Decode)?;
        line.push(b'\n');
        let sent = self.stream.get_mut().write_all(&line);
        // An agent that refuses the connection has closed it already; its reason can be read.
        match sent {
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(self.lost(error).into());
            }
            _ => {}
        }
        loop {
            line.clear();
            match self.stream.read_until(b'\n', &mut line) {
                Ok(0) => return Err(ClientError::Incomplete.into()),
                Ok(_) => {}
                Err(error) => return Err(self.lost(error).into()),
            }
            // The last line is short, so nothing long is decoded for its sake.
            if line.len() <= MAX_LAST_BYTES {
                match decode(&line)? {
                    Reply::End => return Ok(()),
                    Reply::Error(reason) => return Err(ClientError::Refused(reason).into()),
                    _ => {}
                }
            }
            each(&line)?;
        }
    }

    fn lost(&self, source: io::Error) -> ClientError {
        ClientError::Lost {
            path: self.path.clone(),
            source,
        }
    }
}

/// An answer as it is shown: names in it were chosen by others.
fn decode(line: &[u8]) -> Result<Reply, ClientError> {
    // All that has to be escaped is escaped in JSON already, or not ASCII.
    let is_plain = line.is_ascii() && !line.contains(&b'\\');
    if is_plain {
        return serde_json::from_slice(line).map_err(ClientError::Decode);
    }
    let mut value: Value = serde_json::from_slice(line).map_err(ClientError::Decode)?;
    escape(&mut value);
    serde_json::from_value(value).map_err(ClientError::Decode)
}

/// Makes every text one that can be shown. Nothing of ours nests deeper than the decoder goes.
fn escape(value: &mut Value) {
    match value {
        Value::String(text) if !is_plain_text(text) => *text = Escaped(text).to_string(),
        Value::Array(values) => values.iter_mut().for_each(escape),
        Value::Object(fields) => fields.values_mut().for_each(escape),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_an_answer_are_escaped_to_be_shown() {
        let name = "vm1\n\u{1b}[2J\u{202e}";
        let answer = |name: &str| {
            let error = Reply::Error(name.to_owned());
            serde_json::to_vec(&error).unwrap()
        };
        let Ok(Reply::Error(shown)) = decode(&answer(name)) else {
            panic!("no answer");
        };
        assert_eq!(shown, r"vm1\n\u{1b}[2J\u{202e}");
        for plain in ["größe", "a\\b", "vm1"] {
            assert!(matches!(decode(&answer(plain)), Ok(Reply::Error(shown)) if shown == plain));
        }
    }
}
