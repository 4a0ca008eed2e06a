//! Server of the control socket, non-blocking.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;

use super::control::{Answer, MAX_REQUEST_BYTES, Request};

/// Limit of concurrent callers.
const MAX_CALLERS: usize = 16;
/// Longest duration of a call.
const PATIENCE: Duration = Duration::from_secs(10);

/// A connection to the control socket.
struct Caller {
    stream: UnixStream,
    since: Duration,
    request: Vec<u8>,
    answer: Vec<u8>,
    /// The server has read the request.
    asked: bool,
}

/// The listening socket and its callers.
pub(super) struct Server {
    listener: UnixListener,
    path: PathBuf,
    callers: Vec<Caller>,
}

impl Server {
    /// Opens the socket; replaces a socket file without a listener.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        if let Some(folder) = path.parent()
            && !folder.exists()
        {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(folder)?;
        }
        if UnixStream::connect(path).is_ok() {
            return Err(ErrorKind::AddrInUse.into());
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            callers: Vec::new(),
        })
    }

    /// Descriptors to wait for; `true` for a caller that waits for its answer.
    pub(super) fn fds(&self) -> impl Iterator<Item = (BorrowedFd<'_>, bool)> {
        let callers = self.callers.iter();
        let callers = callers.map(|it| (it.stream.as_fd(), !it.answer.is_empty()));
        std::iter::once((self.listener.as_fd(), false)).chain(callers)
    }

    /// Deadline of the earliest caller.
    pub(super) fn poll_timeout(&self) -> Option<Duration> {
        self.callers.iter().map(|it| it.since + PATIENCE).min()
    }

    /// Reads requests and writes the answers of `handle`.
    pub(super) fn serve(&mut self, now: Duration, mut handle: impl FnMut(Request) -> Answer) {
        while self.callers.len() < MAX_CALLERS {
            let Ok((stream, _)) = self.listener.accept() else {
                break;
            };
            if may_ask(&stream) && stream.set_nonblocking(true).is_ok() {
                self.callers.push(Caller {
                    stream,
                    since: now,
                    request: Vec::new(),
                    answer: Vec::new(),
                    asked: false,
                });
            }
        }
        self.callers
            .retain_mut(|caller| now < caller.since + PATIENCE && caller.serve(&mut handle));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The next start replaces a socket file that stays.
        let _ = fs::remove_file(&self.path);
    }
}

impl Caller {
    /// Continues the call; returns whether to keep the connection.
    fn serve(&mut self, handle: &mut impl FnMut(Request) -> Answer) -> bool {
        if !self.asked && !self.read(handle) {
            return false;
        }
        while !self.answer.is_empty() {
            match self.stream.write(&self.answer) {
                Ok(0) => return false,
                Ok(length) => drop(self.answer.drain(..length)),
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
        }
        !self.asked
    }

    fn read(&mut self, handle: &mut impl FnMut(Request) -> Answer) -> bool {
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return false,
                Ok(length) => self
                    .request
                    .extend(buffer.get(..length).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            }
            let end = self.request.iter().position(|it| *it == b'\n');
            let answer = match end.and_then(|end| self.request.get(..end)) {
                Some(line) => match serde_json::from_slice(line) {
                    Ok(request) => handle(request),
                    Err(error) => Answer::Error(format!("Not a request: {error}")),
                },
                None if self.request.len() > MAX_REQUEST_BYTES => Answer::Error(format!(
                    "The request has more than {MAX_REQUEST_BYTES} bytes"
                )),
                None => continue,
            };
            self.asked = true;
            self.answer = serde_json::to_vec(&answer).unwrap_or_default();
            self.answer.push(b'\n');
            return true;
        }
    }
}

/// Whether the peer is root or the node's user.
fn may_ask(stream: &UnixStream) -> bool {
    getsockopt(&stream, PeerCredentials)
        .is_ok_and(|peer| peer.uid() == 0 || peer.uid() == geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::control::{ControlError, ask};
    use proptest::prelude::*;
    use std::thread;
    use tempfile::{TempDir, tempdir};

    /// A socket path in a folder that does not exist yet.
    fn path(folder: &TempDir) -> PathBuf {
        folder.path().join("run/node.sock")
    }

    /// Serves until the caller has its answer.
    fn call<T: Send + 'static>(body: impl FnOnce(PathBuf) -> T + Send + 'static) -> T {
        let folder = tempdir().unwrap();
        let path = path(&folder);
        let mut server = Server::open(&path).unwrap();
        let caller = thread::spawn({
            let path = path.clone();
            move || body(path)
        });
        while !caller.is_finished() {
            server.serve(Duration::ZERO, |request| match request {
                Request::Stop => Answer::Done,
                other => Answer::Error(format!("{other:?}")),
            });
            thread::yield_now();
        }
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        caller.join().unwrap()
    }

    #[test]
    fn request_is_answered() {
        let answer = call(|path| ask(&path, &Request::Stop).unwrap());
        assert_eq!(answer, Answer::Done);
        let error = call(|path| ask(&path, &Request::Completed));
        assert_eq!(error.expect_err("done").to_string(), "Completed");
    }

    #[test]
    fn without_a_node_the_caller_is_told_so() {
        let error = ask(&path(&tempdir().unwrap()), &Request::Stop).expect_err("answered");
        assert!(matches!(error, ControlError::NoNode), "{error}");
    }

    #[test]
    fn too_long_and_garbage_requests_get_a_sentence() {
        for (bytes, hint) in [
            (vec![b'x'; 6000], "4096 bytes"),
            (b"{}\n".to_vec(), "Not a request"),
        ] {
            let answer = call(move |path| {
                let mut stream = UnixStream::connect(path).unwrap();
                stream.write_all(&bytes).unwrap();
                let mut answer = String::new();
                // The server does not read the rest of a long request, which may end the connection
                // early.
                let _ = stream.read_to_string(&mut answer);
                answer
            });
            assert!(answer.contains(hint), "{answer}");
        }
    }

    #[test]
    fn second_node_does_not_take_the_socket() {
        let folder = tempdir().unwrap();
        let path = path(&folder);
        let _server = Server::open(&path).unwrap();
        let error = Server::open(&path).map(drop).expect_err("opened");
        assert_eq!(error.kind(), ErrorKind::AddrInUse);
    }

    proptest! {
        #[test]
        fn any_request_is_parsed_or_refused(text in "[{}\":,a-z_0-9\\[\\]]{0,80}") {
            let _ = serde_json::from_str::<Request>(&text);
        }
    }
}
