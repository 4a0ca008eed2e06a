//! The operator's side of the socket: a blocking client for the commands of `roamcast`.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use common::text::{Escaped, is_plain_text};
use serde::Serialize;
use serde_json::Value;

use super::Reply;
use super::request::{self, Table};

/// Longest [`Reply::End`] or [`Reply::Error`] line, bytes.
const MAX_LAST_BYTES: usize = request::MAX_REQUEST_BYTES;

/// Why the agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No process listens on the socket.
    #[error("No agent listens on {}; start it, or name its socket with --socket", path.display())]
    NoAgent {
        /// Path of the socket.
        path: PathBuf,
    },
    /// This user may not open the socket.
    #[error("Only root may use {}; run the command as root", path.display())]
    NotRoot {
        /// Path of the socket.
        path: PathBuf,
    },
    /// The connection broke.
    #[error("Lost the connection to the agent on {}", path.display())]
    Lost {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// The connection ended in the middle of an answer.
    #[error("The agent stopped in the middle of its answer; see its log")]
    Incomplete,
    /// The answer does not decode.
    #[error("The agent's answer is not understood; is it of another version than this program?")]
    Decode(#[source] serde_json::Error),
    /// The agent refused the request and gave this reason.
    #[error("{0}")]
    Refused(String),
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The agent gave no answer or refused the request.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The kind of the answer does not match the request.
    #[error("The agent answered something else; is it of another version than this program?")]
    Unexpected,
    /// Writing to the output failed.
    #[error("Cannot write the output")]
    Output(#[from] io::Error),
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
    /// [`ClientError`]: no process listens, or this user may not open the socket.
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

    /// Sends a request and passes each reply except the last to `each`.
    ///
    /// # Errors
    ///
    /// [`ClientError`]: the connection broke, or the agent refused the request.
    pub fn ask(
        &mut self,
        request: &impl Serialize,
        mut each: impl FnMut(Reply),
    ) -> Result<(), ClientError> {
        self.ask_lines(request, |line| {
            each(decode(line)?);
            Ok::<_, ClientError>(())
        })
    }

    /// Sends a request and passes each reply except the last to `each`, until `each` fails.
    ///
    /// # Errors
    ///
    /// [`CommandError`]: as for [`Client::ask`], or the error of `each`.
    pub fn follow(
        &mut self,
        request: &impl Serialize,
        mut each: impl FnMut(Reply) -> Result<(), CommandError>,
    ) -> Result<(), CommandError> {
        self.ask_lines(request, |line| each(decode(line)?))
    }

    /// Returns a second handle, with which another thread can shut the connection down.
    ///
    /// # Errors
    ///
    /// [`ClientError::Lost`].
    pub fn handle(&self) -> Result<UnixStream, ClientError> {
        let stream = self.stream.get_ref().try_clone();
        stream.map_err(|source| self.lost(source))
    }

    /// Requests a table and copies its rows to `out` as one JSON array. The client does not decode
    /// the rows: a table may have tens of thousands of them.
    ///
    /// # Errors
    ///
    /// [`CommandError`]: as for [`Client::ask`], or writing to `out` failed.
    pub fn copy_rows(&mut self, table: Table, out: &mut impl Write) -> Result<(), CommandError> {
        let prefix: &[u8] = match table {
            Table::Listeners => br#"{"reply":"listeners","data":["#,
            Table::Streams => br#"{"reply":"streams","data":["#,
            Table::Migrations => br#"{"reply":"migrations","data":["#,
            Table::Relays => br#"{"reply":"relays","data":["#,
        };
        let mut separator: &[u8] = b"[";
        self.ask_lines(&table.request(), |line| {
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

    /// Sends a request and passes each line except the last to `each`.
    fn ask_lines<E: From<ClientError>>(
        &mut self,
        request: &impl Serialize,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut line = serde_json::to_vec(request).map_err(ClientError::Decode)?;
        line.push(b'\n');
        let sent = self.stream.get_mut().write_all(&line);
        // An agent that refuses a connection closes it at once. Its reason can still be read.
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
            // The last line of an answer is short; longer lines need no decoding here.
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

/// Decodes a line for display. Guests and other hosts chose the names in it, so control characters
/// are escaped.
fn decode(line: &[u8]) -> Result<Reply, ClientError> {
    // JSON escapes ASCII control characters, so a plain line contains none.
    let is_plain = line.is_ascii() && !line.contains(&b'\\');
    if is_plain {
        return serde_json::from_slice(line).map_err(ClientError::Decode);
    }
    let mut value: Value = serde_json::from_slice(line).map_err(ClientError::Decode)?;
    escape(&mut value);
    serde_json::from_value(value).map_err(ClientError::Decode)
}

/// Escapes every string of a value. The decoder bounds the depth of the recursion.
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
