//! Sessions between the correspondent and the guest, by their permanent addresses. Their gaps are
//! what a user notices of a migration.
//!
//! ```text
//!  correspondent                                  guest
//!   a numbered line each 10 ms  --- TCP, opened by the correspondent --->  echo
//!   a numbered line each 10 ms  --- TCP, opened by the guest ----------->  echo
//!   an echo request each 10 ms  --- ICMPv6 ------------------------------> kernel
//! ```
//!
//! Threads of this process take all times by the host's clock, because the guest's clock stands
//! still while the guest is paused. The sockets belong to the correspondent's network namespace.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::mobility::{GUEST_HOA, PEER_HOA};
use crate::guest::control::Control;
use crate::guest::program::Running;
use crate::guest::sys;
use crate::host::Host;
use crate::probe::clock;
use crate::probe::metrics::Window;
use crate::probe::report::RunRow;
use crate::wait;

/// Interval of the lines and of the echo requests.
const INTERVAL: Duration = Duration::from_millis(10);
/// TCP port at which the guest's echo listens.
const GUEST_PORT: u16 = 7000;
/// TCP port at which the correspondent accepts the guest's connection.
const PEER_PORT: u16 = 7001;
/// Longest time until the sessions are established.
const START: Duration = Duration::from_secs(20);
/// Interval at which a blocked thread checks whether to stop.
const STOP_CHECK: Duration = Duration::from_millis(100);
/// Types of ICMPv6 (RFC 4443 sections 4.1 and 4.2).
const ECHO_REQUEST: u8 = 128;
const ECHO_REPLY: u8 = 129;

/// The three sessions. The drop of this value ends them.
pub struct Sessions {
    incoming: Arc<Record>,
    outgoing: Arc<Record>,
    ping: Arc<Record>,
    shall_stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    applications: Vec<Running>,
}

/// Record of a session. Its items are lines or echo requests, numbered from 0.
#[derive(Default)]
struct Record(Mutex<Times>);

#[derive(Default)]
struct Times {
    /// Time at which each item was sent.
    sent_ns: Vec<u64>,
    /// Time of the answer to each item; `None` without an answer.
    answered_ns: Vec<Option<u64>>,
    /// Why the session broke; `None` while it works.
    broken: Option<String>,
}

impl Record {
    fn with<T>(&self, action: impl FnOnce(&mut Times) -> T) -> T {
        action(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records that an item is sent now. Returns its number.
    fn send(&self) -> usize {
        self.with(|times| {
            times.sent_ns.push(clock::now_ns());
            times.answered_ns.push(None);
            times.sent_ns.len() - 1
        })
    }

    /// Records the answer to an item; only the first answer counts.
    fn answer(&self, number: usize) {
        let now = clock::now_ns();
        self.with(|times| {
            if let Some(answered) = times.answered_ns.get_mut(number) {
                answered.get_or_insert(now);
            }
        });
    }

    /// Returns true if an item sent at that time or later has been answered.
    fn has_answers_since(&self, from_ns: u64) -> bool {
        self.with(|times| {
            let mut answered = times.sent_ns.iter().zip(&times.answered_ns);
            answered.any(|(sent, answer)| *sent >= from_ns && answer.is_some())
        })
    }

    fn end(&self, why: String) {
        self.with(|times| times.broken.get_or_insert(why).truncate(200));
    }
}

impl Times {
    /// Returns the longest gap between answers in a window, milliseconds.
    fn gap_ms(&self, window: Window) -> f64 {
        let inside = |ns: &u64| (window.from_ns..=window.to_ns).contains(ns);
        let mut answers: Vec<u64> = self.answered_ns.iter().copied().flatten().collect();
        answers.retain(inside);
        answers.extend([window.from_ns, window.to_ns]);
        answers.sort_unstable();
        let gaps = answers.windows(2).filter_map(|it| match it {
            [from, to] => Some(to - from),
            _ => None,
        });
        gaps.max().unwrap_or_default() as f64 / 1e6
    }

    /// Returns the number of items sent in a window without an answer.
    fn lost(&self, window: Window) -> u64 {
        let sent = self.sent_ns.iter().zip(&self.answered_ns);
        let inside = sent.filter(|(ns, _)| window.contains(**ns));
        inside.filter(|(_, answered)| answered.is_none()).count() as u64
    }
}

impl Sessions {
    /// Establishes all three sessions and waits until each has an answer.
    ///
    /// # Errors
    ///
    /// When a session is not established in time.
    pub fn start(peer: &Host, guest: &Control) -> Result<Self> {
        let mut sessions = Self {
            incoming: Arc::default(),
            outgoing: Arc::default(),
            ping: Arc::default(),
            shall_stop: Arc::default(),
            threads: Vec::new(),
            applications: Vec::new(),
        };
        let mut echo = guest.spawn("/init", &["echo", "listen", &GUEST_PORT.to_string()])?;
        let line = echo.next_line(START)?;
        ensure!(
            line.is_some_and(|it| it.text == "listens"),
            "The guest's echo does not listen: {}",
            echo.output().stderr()
        );
        sessions.applications.push(echo);
        let stream = peer.within(|| -> Result<TcpStream> {
            let socket = stream_socket(0)?;
            let to = SocketAddrV6::new(GUEST_HOA, GUEST_PORT, 0, 0);
            socket
                .connect_timeout(&to.into(), START)
                .context("The guest cannot be reached by its permanent address")?;
            Ok(socket.into())
        })??;
        sessions.talk(stream, &Arc::clone(&sessions.incoming))?;

        let listener = peer.within(|| -> Result<Socket> {
            let socket = stream_socket(PEER_PORT)?;
            socket.listen(1)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        })??;
        let (address, port) = (PEER_HOA.to_string(), PEER_PORT.to_string());
        let caller = guest.spawn("/init", &["echo", "connect", &address, &port])?;
        let accepted = wait::until("the guest's session", START, || listener.accept().ok())
            .with_context(|| caller.output().stderr());
        sessions.applications.push(caller);
        let (stream, _) = accepted?;
        stream.set_nonblocking(false)?;
        sessions.talk(stream.into(), &Arc::clone(&sessions.outgoing))?;

        let socket = peer.within(ping_socket)??;
        sessions.ping(socket)?;
        sessions.wait_answered()?;
        Ok(sessions)
    }

    /// Waits until each session has an answer to an item sent after the call.
    ///
    /// # Errors
    ///
    /// When a session has no answer in time.
    pub fn wait_answered(&self) -> Result<()> {
        let from_ns = clock::now_ns();
        let all = [&self.incoming, &self.outgoing, &self.ping];
        wait::until("answers in all sessions", START, || {
            all.iter()
                .all(|it| it.has_answers_since(from_ns))
                .then_some(())
        })
    }

    /// Starts a thread that sends numbered lines and a thread that reads their echo.
    fn talk(&mut self, mut stream: TcpStream, record: &Arc<Record>) -> Result<()> {
        stream.set_nodelay(true)?;
        let input = stream.try_clone()?;
        input.set_read_timeout(None)?;
        let (sent, shall_stop) = (Arc::clone(record), Arc::clone(&self.shall_stop));
        self.threads.push(thread::spawn(move || {
            at_intervals(&shall_stop, || {
                let line = format!("{:09}\n", sent.send());
                if let Err(error) = stream.write_all(line.as_bytes()) {
                    sent.end(error.to_string());
                }
            });
            // The shutdown also ends the other thread's read.
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }));
        let (answered, shall_stop) = (Arc::clone(record), Arc::clone(&self.shall_stop));
        self.threads.push(thread::spawn(move || {
            let _ = sys::run_first();
            for line in BufReader::new(input).lines() {
                match line.map(|it| it.parse()) {
                    Ok(Ok(number)) => answered.answer(number),
                    Ok(Err(_)) => answered.end("What came back is not what was sent".to_owned()),
                    Err(error) => answered.end(error.to_string()),
                }
            }
            if !shall_stop.load(Ordering::Relaxed) {
                answered.end("The other side has ended the session".to_owned());
            }
        }));
        Ok(())
    }

    fn ping(&mut self, socket: Socket) -> Result<()> {
        let requests = socket.try_clone()?;
        let (sent, shall_stop) = (Arc::clone(&self.ping), Arc::clone(&self.shall_stop));
        self.threads.push(thread::spawn(move || {
            at_intervals(&shall_stop, || {
                // A request that the kernel refuses to send counts as lost.
                let _ = requests.send(&echo_request(sent.send()));
            });
        }));
        let (answered, shall_stop) = (Arc::clone(&self.ping), Arc::clone(&self.shall_stop));
        self.threads.push(thread::spawn(move || {
            let _ = sys::run_first();
            let _ = socket.set_read_timeout(Some(STOP_CHECK));
            let mut buffer = [0; 256];
            while !shall_stop.load(Ordering::Relaxed) {
                let length = (&socket).read(&mut buffer).unwrap_or_default();
                if let Some(number) = echo_reply(buffer.get(..length).unwrap_or_default()) {
                    answered.answer(number);
                }
            }
        }));
        Ok(())
    }

    /// Returns direction and reason of each broken TCP session.
    pub fn broken(&self) -> Vec<String> {
        let both = [("in", &self.incoming), ("out", &self.outgoing)];
        both.into_iter()
            .filter_map(|(name, it)| {
                it.with(|times| Some(format!("{name}: {}", times.broken.clone()?)))
            })
            .collect()
    }

    /// Fills in the results of a window. The answers of the window must have had time to arrive.
    pub fn fill(&self, row: RunRow, window: Window) -> RunRow {
        RunRow {
            tcp_in_gap_ms: Some(self.incoming.with(|it| it.gap_ms(window))),
            tcp_out_gap_ms: Some(self.outgoing.with(|it| it.gap_ms(window))),
            tcp_resets: Some(self.broken().len() as u64),
            ping_gap_ms: Some(self.ping.with(|it| it.gap_ms(window))),
            ping_lost: Some(self.ping.with(|it| it.lost(window))),
            ..row
        }
    }
}

impl Drop for Sessions {
    fn drop(&mut self) {
        self.shall_stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        for application in &self.applications {
            // The application may have ended already, or the guest may be gone.
            let _ = application.terminate();
        }
    }
}

/// Creates a TCP socket bound to the correspondent's permanent address.
fn stream_socket(port: u16) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    let from = SocketAddrV6::new(PEER_HOA, port, 0, 0);
    socket
        .bind(&from.into())
        .context("The correspondent has no permanent address")?;
    Ok(socket)
}

fn ping_socket() -> Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    let address = |hoa: Ipv6Addr| SocketAddr::from((hoa, 0));
    socket.bind(&address(PEER_HOA).into())?;
    socket.connect(&address(GUEST_HOA).into())?;
    Ok(socket)
}

/// Returns an Echo Request. Its data is the whole number, because the sequence number has only 16
/// bits. The kernel computes the checksum.
fn echo_request(number: usize) -> [u8; 16] {
    let number = number as u64;
    let mut message = [0; 16];
    message[0] = ECHO_REQUEST;
    message[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    message[8..].copy_from_slice(&number.to_be_bytes());
    message
}

/// Returns the number in an Echo Reply.
fn echo_reply(message: &[u8]) -> Option<usize> {
    let data: [u8; 8] = message.get(8..16)?.try_into().ok()?;
    let number = usize::try_from(u64::from_be_bytes(data)).ok()?;
    (message.first() == Some(&ECHO_REPLY)).then_some(number)
}

/// Repeats an action at [`INTERVAL`] until `shall_stop` is set, and catches up after a delay.
fn at_intervals(shall_stop: &AtomicBool, mut action: impl FnMut()) {
    let _ = sys::run_first();
    let mut next = Instant::now();
    while !shall_stop.load(Ordering::Relaxed) {
        action();
        next += INTERVAL;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Window = Window {
        from_ns: 10_000_000,
        to_ns: 100_000_000,
    };

    #[test]
    fn gap_is_the_longest_time_without_an_answer_within_the_window() {
        let at = |times: &[u64]| Times {
            answered_ns: times.iter().map(|ms| Some(ms * 1_000_000)).collect(),
            ..Times::default()
        };
        assert!((at(&[1, 20, 70, 90, 300]).gap_ms(WINDOW) - 50.0).abs() < 1e-9);
        assert!(
            (at(&[20, 30]).gap_ms(WINDOW) - 70.0).abs() < 1e-9,
            "at its end"
        );
        assert!((at(&[]).gap_ms(WINDOW) - 90.0).abs() < 1e-9);
    }

    #[test]
    fn what_was_sent_in_the_window_and_never_answered_is_lost() {
        let times = Times {
            sent_ns: [5, 15, 25, 105].map(|ms| ms * 1_000_000).to_vec(),
            answered_ns: vec![None, None, Some(200_000_000), None],
            broken: None,
        };
        assert_eq!(times.lost(WINDOW), 1);
    }

    #[test]
    fn number_comes_back_in_the_reply() {
        let mut message = echo_request(70_000);
        assert_eq!(echo_reply(&message), None);
        message[0] = ECHO_REPLY;
        assert_eq!(echo_reply(&message), Some(70_000));
        assert_eq!(echo_reply(&message[..12]), None);
    }
}
