//! What takes frames out of the TAPs, as QEMU does: one `read` for each. It counts the stream's
//! packets and has UDP checksums computed anew by etherparse, which shares nothing with the code
//! that is measured.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::world::{DESTINATION_PORT, MULTICAST_ADDRESS, SOURCE, SOURCE_PORT};
use crate::tap;

/// Of so many packets one is checked, unless all are.
const CHECKED: u64 = 64;
/// How long the reader waits at once.
const WAIT: Duration = Duration::from_millis(50);

/// Counts of all TAPs together.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Whether the reader waits until it is told to take what is there.
    held: AtomicBool,
    /// How often it was told.
    released: AtomicU64,
    check_all: AtomicBool,
    delivered: AtomicU64,
    checked: AtomicU64,
    wrong: AtomicU64,
    /// Checked ones with another source address or port than the stream's.
    other_source: AtomicU64,
}

/// What was checked since [`Taps::forget_checks`].
#[derive(Clone, Copy, Debug)]
pub struct Checks {
    pub checked: u64,
    pub wrong: u64,
    pub other_source: u64,
}

/// TAPs with a reader.
pub struct Taps {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

impl Taps {
    /// Opens TAPs in the calling thread's namespace and reads them.
    pub fn open(names: &[String]) -> Result<Self> {
        let files = names.iter().map(|name| tap::open(name)).collect();
        let shared = Arc::new(Shared::default());
        let reader = thread::Builder::new().name("taps".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || read(files, &shared)
        });
        Ok(Self {
            shared,
            reader: Some(reader.context("Failed to start a thread")?),
        })
    }

    /// Packets of the stream so far, of all TAPs.
    pub fn delivered(&self) -> u64 {
        self.shared.delivered.load(Ordering::Relaxed)
    }

    /// Holds the reader back until it is told by [`Taps::take`], or lets it go on.
    pub fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::Relaxed);
        if let Some(reader) = &self.reader {
            reader.thread().unpark();
        }
    }

    /// Has a reader that is held back take all frames that are there.
    pub fn take(&self) {
        self.shared.released.fetch_add(1, Ordering::Relaxed);
        if let Some(reader) = &self.reader {
            reader.thread().unpark();
        }
    }

    /// Checks every packet, or some.
    pub fn check_all(&self, all: bool) {
        self.shared.check_all.store(all, Ordering::Relaxed);
    }

    pub fn forget_checks(&self) {
        for count in [
            &self.shared.checked,
            &self.shared.wrong,
            &self.shared.other_source,
        ] {
            count.store(0, Ordering::Relaxed);
        }
    }

    pub fn checks(&self) -> Checks {
        Checks {
            checked: self.shared.checked.load(Ordering::Relaxed),
            wrong: self.shared.wrong.load(Ordering::Relaxed),
            other_source: self.shared.other_source.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn read(mut files: Vec<File>, shared: &Shared) {
    let mut delivered = 0;
    let mut released = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        if shared.held.load(Ordering::Relaxed) {
            thread::park_timeout(WAIT);
            let now = shared.released.load(Ordering::Relaxed);
            if now != released {
                released = now;
                take(files.iter_mut(), &mut delivered, shared);
            }
            continue;
        }
        let ready = ready(&files);
        if shared.held.load(Ordering::Relaxed) {
            continue;
        }
        let files = files.iter_mut().zip(ready);
        let files = files.filter_map(|(file, is_ready)| is_ready.then_some(file));
        take(files, &mut delivered, shared);
    }
}

/// Waits until some TAPs have frames; returns which.
fn ready(files: &[File]) -> Vec<bool> {
    let fds = files
        .iter()
        .map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN));
    let mut fds: Vec<PollFd<'_>> = fds.collect();
    // A signal is as good as the end of the time.
    let _ = poll(
        &mut fds,
        PollTimeout::try_from(WAIT).unwrap_or(PollTimeout::ZERO),
    );
    fds.iter().map(|fd| fd.any().unwrap_or(false)).collect()
}

/// Takes all frames that are there.
fn take<'a>(files: impl Iterator<Item = &'a mut File>, delivered: &mut u64, shared: &Shared) {
    let mut frame = [0; 4096];
    for file in files {
        while let Ok(length) = file.read(&mut frame) {
            let frame = frame.get(..length).unwrap_or_default();
            if !is_of_stream(frame) {
                continue;
            }
            *delivered += 1;
            if delivered.is_multiple_of(CHECKED) || shared.check_all.load(Ordering::Relaxed) {
                check(frame, shared);
            }
            shared.delivered.store(*delivered, Ordering::Relaxed);
        }
    }
}

fn is_of_stream(frame: &[u8]) -> bool {
    frame.get(38..54) == Some(&MULTICAST_ADDRESS.octets())
        && frame.get(56..58) == Some(&DESTINATION_PORT.to_be_bytes())
}

fn check(frame: &[u8], shared: &Shared) {
    shared.checked.fetch_add(1, Ordering::Relaxed);
    let right = SlicedPacket::from_ethernet(frame).is_ok_and(|packet| {
        let (Some(NetSlice::Ipv6(ip)), Some(TransportSlice::Udp(udp))) =
            (&packet.net, &packet.transport)
        else {
            return false;
        };
        let (header, ip) = (udp.to_header(), ip.header());
        if ip.source_addr() != SOURCE || header.source_port != SOURCE_PORT {
            shared.other_source.fetch_add(1, Ordering::Relaxed);
        }
        header.calc_checksum_ipv6_raw(ip.source(), ip.destination(), udp.payload())
            == Ok(header.checksum)
    });
    if !right {
        shared.wrong.fetch_add(1, Ordering::Relaxed);
    }
}
