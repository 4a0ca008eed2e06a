//! A process that reads TAPs like QEMU's main thread, for the test `vhost` and the bench `rates`.
//! The process sleeps in `poll`. After the stop of the VM it reads one or a few frames from each
//! TAP's queue, sooner or later.
//!
//! ```text
//!  VM runs:  poll(orders)                            vhost-net reads the TAPs
//!            poll(orders, TAP) --> numbers           without vhost-net: the process serves the VM
//!  stopped:  held up --> poll(orders, TAPs) --> frames of each TAP, which are reported
//! ```
//!
//! The program has the name that the agent expects of a QEMU. Its main thread can take another
//! name, which hides the process from the agent.

#![allow(unsafe_code, reason = "TAPs are inherited by number")]

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::binaries;

/// Name of the program, and of its main thread while the agent should see the process.
pub const NAME: &str = "qemu-main-loop";
/// Name of the main thread while the agent should not see the process.
const HIDDEN: &str = "main-loop";
/// Limit of the reported part of a frame, bytes.
const TOLD_BYTES: usize = 128;
/// Limit of frames read from a TAP in a row, as in QEMU.
const AT_ONCE: usize = 50;
/// Offset of the number in a numbered datagram: behind Ethernet, IPv6 and UDP header.
const NUMBER: std::ops::Range<usize> = 62..66;
/// Offset of the IPv6 Next Header field, and its value for UDP.
const NEXT_HEADER: usize = 20;
const UDP: u8 = 17;
/// Offset of the IPv6 destination, and the first byte of a multicast address.
const DESTINATION: usize = 38;
const MULTICAST: u8 = 0xff;
/// EtherType of IPv6, and its offset.
const IPV6: [u8; 2] = [0x86, 0xdd];
const ETHER_TYPE: std::ops::Range<usize> = 12..14;

/// Length of an order, bytes: kind, mode, number, and a time in microseconds.
const ORDER_BYTES: usize = 7;

/// Reason for the delay between the stop and the main loop's next look at its TAPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldUp {
    /// The main loop has other work.
    Busy,
    /// The main loop waits for a lock, as QEMU does for its big lock.
    Locked,
    /// Other work and a lock take turns.
    Both,
}

impl HeldUp {
    const ALL: [Self; 3] = [Self::Busy, Self::Locked, Self::Both];

    fn pass(self, time: Duration) {
        let end = Instant::now() + time;
        let left = || end.saturating_duration_since(Instant::now());
        let turn = Duration::from_micros(300);
        while !left().is_zero() {
            match self {
                Self::Busy => std::hint::spin_loop(),
                Self::Locked => thread::park_timeout(left()),
                Self::Both => {
                    let until = Instant::now() + turn;
                    while Instant::now() < until {
                        std::hint::spin_loop();
                    }
                    thread::park_timeout(left().min(turn));
                }
            }
        }
    }
}

/// Orders to the process.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// Show the process to the agent, or hide it.
    Show(bool),
    /// vhost-net has released the TAPs: read this number of frames from each TAP, after the time.
    Stopped(HeldUp, u8, Duration),
    /// Leave the TAPs alone.
    Gone,
    /// The VM runs without vhost-net: read its multicast datagrams from the first TAP.
    Serve,
    /// Report the numbers of the datagrams that the VM has received.
    Had,
}

impl Order {
    fn encode(self) -> [u8; ORDER_BYTES] {
        let (what, how, reads, time) = match self {
            Self::Show(shown) => (0, u8::from(shown), 0, Duration::ZERO),
            Self::Stopped(how, reads, time) => (1, how as u8, reads, time),
            Self::Gone => (2, 0, 0, Duration::ZERO),
            Self::Serve => (3, 0, 0, Duration::ZERO),
            Self::Had => (4, 0, 0, Duration::ZERO),
        };
        let [a, b, c, d] = u32::try_from(time.as_micros())
            .unwrap_or(u32::MAX)
            .to_le_bytes();
        [what, how, reads, a, b, c, d]
    }

    /// Reads an order; `None` at the end of the input.
    fn read(mut control: &UnixStream) -> Result<Option<Self>> {
        let mut bytes = [0; ORDER_BYTES];
        if let Err(error) = control.read_exact(&mut bytes) {
            return match error.kind() {
                io::ErrorKind::UnexpectedEof => Ok(None),
                _ => Err(error.into()),
            };
        }
        let [what, how, reads, time @ ..] = bytes;
        let time = Duration::from_micros(u32::from_le_bytes(time).into());
        Ok(Some(match what {
            0 => Self::Show(how != 0),
            1 => {
                let how = HeldUp::ALL.get(usize::from(how));
                Self::Stopped(*how.context("An order is not understood")?, reads, time)
            }
            2 => Self::Gone,
            3 => Self::Serve,
            4 => Self::Had,
            _ => bail!("An order is not understood"),
        }))
    }
}

/// Handle of the process, for the test.
#[derive(Debug)]
pub struct MainLoop {
    child: Child,
    control: UnixStream,
}

impl MainLoop {
    /// Starts the process with these TAPs in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// When the program is not built or cannot be started.
    pub fn start(taps: &[File]) -> Result<Self> {
        let (control, theirs) = UnixStream::pair()?;
        // The process inherits duplicates, because `exec` closes the originals.
        let inherited =
            (taps.iter().map(nix::unistd::dup)).collect::<nix::Result<Vec<OwnedFd>>>()?;
        let child = Command::new(binaries::path(NAME)?)
            .args(inherited.iter().map(|tap| tap.as_raw_fd().to_string()))
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .context("Cannot start the main loop")?;
        Ok(Self { child, control })
    }

    /// Shows the process to the agent or hides it.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn show(&mut self, shown: bool) -> Result<()> {
        self.order(Order::Show(shown))?;
        self.told().map(drop)
    }

    /// Announces the stop of the VM, which wakes the process. After `time`, the process polls the
    /// TAPs until it has read `reads` frames from each TAP.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn stopped(&mut self, how: HeldUp, reads: u8, time: Duration) -> Result<()> {
        self.order(Order::Stopped(how, reads, time))
    }

    /// Makes the process leave the TAPs alone. Returns the beginnings of the frames read since the
    /// stop.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn gone(&mut self) -> Result<Vec<Vec<u8>>> {
        self.order(Order::Gone)?;
        self.told()
    }

    /// Makes the process serve a running VM without vhost-net, until the VM stops.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn serve(&mut self) -> Result<()> {
        self.order(Order::Serve)
    }

    /// Returns the numbers of the datagrams that the VM has received since the last call, in order.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn had(&mut self) -> Result<Vec<u32>> {
        self.order(Order::Had)?;
        let mut count = [0; 4];
        self.control.read_exact(&mut count)?;
        let mut numbers = vec![0; 4 * usize::try_from(u32::from_le_bytes(count))?];
        self.control.read_exact(&mut numbers)?;
        let (numbers, _) = numbers.as_chunks::<4>();
        Ok(numbers.iter().map(|it| u32::from_le_bytes(*it)).collect())
    }

    fn order(&mut self, order: Order) -> Result<()> {
        self.control
            .write_all(&order.encode())
            .context("The main loop is gone")
    }

    /// Reads reported frames until an empty one marks the end.
    fn told(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            let mut length = [0];
            self.control.read_exact(&mut length)?;
            let mut frame = vec![0; length[0].into()];
            self.control.read_exact(&mut frame)?;
            if frame.is_empty() {
                return Ok(frames);
            }
            frames.push(frame);
        }
    }
}

impl Drop for MainLoop {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the program. Orders arrive on standard input; the arguments are the file descriptors of the
/// TAPs.
///
/// # Errors
///
/// When the program was not started by [`MainLoop::start`].
pub fn run(arguments: impl Iterator<Item = String>) -> Result<()> {
    let taps = arguments
        .map(|number| {
            let number: RawFd = number.parse().context("That is no descriptor")?;
            // SAFETY: the descriptor was inherited for this purpose, and nothing else here uses it.
            Ok(unsafe { File::from_raw_fd(number) })
        })
        .collect::<Result<Vec<File>>>()?;
    let mut control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // Each TAP with the number of frames still to read.
    let mut polled: Vec<(&File, u8)> = Vec::new();
    let mut numbers = Vec::new();
    loop {
        let mut fds = vec![PollFd::new(control.as_fd(), PollFlags::POLLIN)];
        fds.extend(
            polled
                .iter()
                .map(|(tap, _)| PollFd::new(tap.as_fd(), PollFlags::POLLIN)),
        );
        poll(&mut fds, PollTimeout::NONE)?;
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        // Ready TAPs are read before any order takes effect, because this `poll` covered them.
        let mut is_ready = ready.iter().skip(1);
        let mut read = Vec::new();
        polled.retain_mut(|(tap, reads)| {
            if is_ready.next() == Some(&true) {
                read.push(*tap);
                *reads -= 1;
            }
            *reads > 0
        });
        for mut tap in read {
            let mut frame = vec![0; 1 << 16];
            let length = tap.read(&mut frame).context("A TAP is gone")?;
            tell(&mut control, &frame[..length.min(TOLD_BYTES)])?;
        }
        if ready.first() != Some(&true) {
            continue;
        }
        match Order::read(&control)? {
            None => return Ok(()),
            Some(Order::Show(shown)) => {
                fs::write("/proc/self/comm", if shown { NAME } else { HIDDEN })?;
                tell(&mut control, &[])?;
            }
            Some(Order::Stopped(how, reads, time)) => {
                how.pass(time);
                polled = taps.iter().map(|tap| (tap, reads)).collect();
            }
            Some(Order::Gone) => {
                polled.clear();
                tell(&mut control, &[])?;
            }
            Some(Order::Serve) => {
                let tap = taps.first().context("There is no TAP to serve")?;
                serve(tap, &control, &mut numbers)?;
            }
            Some(Order::Had) => {
                let count = u32::try_from(numbers.len()).context("That is too much to tell")?;
                control.write_all(&count.to_le_bytes())?;
                control.write_all(
                    &numbers
                        .drain(..)
                        .flat_map(u32::to_le_bytes)
                        .collect::<Vec<u8>>(),
                )?;
            }
        }
    }
}

/// Reads the datagrams of a running VM until an order arrives.
fn serve(mut tap: &File, control: &UnixStream, numbers: &mut Vec<u32>) -> Result<()> {
    let mut frame = vec![0; 1 << 16];
    loop {
        let mut fds = [
            PollFd::new(control.as_fd(), PollFlags::POLLIN),
            PollFd::new(tap.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut fds, PollTimeout::NONE)?;
        if fds[0].any() == Some(true) {
            return Ok(());
        }
        for _ in 0..AT_ONCE {
            match tap.read(&mut frame) {
                Ok(length) => numbers.extend(frame.get(..length).and_then(number)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("A TAP is gone"),
            }
        }
    }
}

/// Returns the number in a multicast datagram; `None` for any other frame.
fn number(frame: &[u8]) -> Option<u32> {
    let is_multicast = frame.get(ETHER_TYPE) == Some(&IPV6)
        && frame.get(NEXT_HEADER) == Some(&UDP)
        && frame.get(DESTINATION) == Some(&MULTICAST);
    let number = frame.get(NUMBER)?.try_into().ok()?;
    is_multicast.then(|| u32::from_le_bytes(number))
}

fn tell(control: &mut UnixStream, frame: &[u8]) -> Result<()> {
    let length = u8::try_from(frame.len()).context("That is too much to tell")?;
    control.write_all(&[length])?;
    control.write_all(frame).context("Nobody listens")
}
