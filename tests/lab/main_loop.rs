//! A process that does with TAPs what QEMU's main thread does, for the test `vhost` and the bench `rates`:
//! it sleeps in `poll`, and once the VM has stopped it reads a frame or a few of each TAP's queue, sooner or
//! later.
//!
//! ```text
//!  VM runs:  poll(orders)                            vhost-net reads the TAPs
//!            poll(orders, TAP) --> numbers           without vhost-net: it serves the VM
//!  stopped:  held up --> poll(orders, TAPs) --> frames of each, which are told
//! ```
//!
//! The program is called as the agent expects of a QEMU; its main thread can take another name, so that
//! the agent sees none.

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

/// Name of the program, and of its main thread while the agent is to see it.
pub const NAME: &str = "qemu-main-loop";
/// Its name else.
const HIDDEN: &str = "main-loop";
/// Most that is told of a frame, bytes.
const TOLD_BYTES: usize = 128;
/// Most frames that are read of a TAP before anything else is looked at, as QEMU does.
const AT_ONCE: usize = 50;
/// Where a numbered datagram has its number: behind Ethernet, IPv6 and UDP header.
const NUMBER: std::ops::Range<usize> = 62..66;
/// Where the next header stands in it, and that of UDP.
const NEXT_HEADER: usize = 20;
const UDP: u8 = 17;
/// Where the IPv6 destination begins, and with which byte if that is multicast.
const DESTINATION: usize = 38;
const MULTICAST: u8 = 0xff;
/// EtherType of IPv6, and where it stands.
const IPV6: [u8; 2] = [0x86, 0xdd];
const ETHER_TYPE: std::ops::Range<usize> = 12..14;

/// An order: what, how, a number, and a time in microseconds.
const ORDER_BYTES: usize = 7;

/// What keeps the main loop from its TAPs when the VM has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeldUp {
    /// It has something else to do.
    Busy,
    /// It waits for a lock, as for QEMU's big one.
    Locked,
    /// Both in turn.
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

/// What the process is told.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// To be seen by the agent, or not.
    Show(bool),
    /// vhost-net has given the TAPs back; so many frames are read of each.
    Stopped(HeldUp, u8, Duration),
    /// The TAPs are nobody's.
    Gone,
    /// The VM runs, without vhost-net: its multicast datagrams are read of the first TAP.
    Serve,
    /// To tell the numbers of what the VM has had.
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

    /// Reads one; `None` when there are no more.
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

/// The process, as the test has it.
#[derive(Debug)]
pub struct MainLoop {
    child: Child,
    control: UnixStream,
}

impl MainLoop {
    /// Starts it with these TAPs in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// When the program is not built or cannot be started.
    pub fn start(taps: &[File]) -> Result<Self> {
        let (control, theirs) = UnixStream::pair()?;
        // Duplicates, because these are closed at the start of a program.
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

    /// Has the agent see it or not from now on.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn show(&mut self, shown: bool) -> Result<()> {
        self.order(Order::Show(shown))?;
        self.told().map(drop)
    }

    /// Tells that the VM has stopped. When this returns, the process is awake; it polls the TAPs after
    /// `time`, until it has read so many frames of each.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn stopped(&mut self, how: HeldUp, reads: u8, time: Duration) -> Result<()> {
        self.order(Order::Stopped(how, reads, time))
    }

    /// Has it leave the TAPs alone; returns what it has read since the stop, the beginning of each frame.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn gone(&mut self) -> Result<Vec<Vec<u8>>> {
        self.order(Order::Gone)?;
        self.told()
    }

    /// Has it serve a VM that runs, without vhost-net, until that is stopped.
    ///
    /// # Errors
    ///
    /// When the process is gone.
    pub fn serve(&mut self) -> Result<()> {
        self.order(Order::Serve)
    }

    /// The numbers of the datagrams that the VM has had since they were last asked for, in their order.
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

    /// Frames, up to an empty one.
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

/// The process itself: standard input has the orders, the arguments are the numbers of the TAPs'
/// descriptors.
///
/// # Errors
///
/// When it was not started by [`MainLoop::start`].
pub fn run(arguments: impl Iterator<Item = String>) -> Result<()> {
    let taps = arguments
        .map(|number| {
            let number: RawFd = number.parse().context("That is no descriptor")?;
            // SAFETY: the descriptor was inherited for this purpose, and nothing else here has it.
            Ok(unsafe { File::from_raw_fd(number) })
        })
        .collect::<Result<Vec<File>>>()?;
    let mut control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    // With the number of frames that are still to be read.
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
        // Before any order: it has polled them.
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

/// Reads what comes for a VM that runs, until there is an order.
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

/// The number of a multicast datagram.
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
