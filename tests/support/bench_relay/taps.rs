//! Reads frames from the TAPs as QEMU does, with one `read` per frame. The reader counts the
//! packets of the stream and verifies UDP checksums by etherparse, which shares no code with the
//! measured programs.

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

/// The reader checks one of this many packets, unless all packets are checked.
const CHECKED: u64 = 64;
/// Timeout of one wait of the reader.
const WAIT: Duration = Duration::from_millis(50);

/// State shared with the reader; counts are sums over all TAPs.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// True if the reader waits for [`Taps::take`].
    held: AtomicBool,
    /// Number of calls of [`Taps::take`].
    released: AtomicU64,
    check_all: AtomicBool,
    delivered: AtomicU64,
    checked: AtomicU64,
    wrong: AtomicU64,
    /// Checked packets whose source address or port is not the stream's.
    other_source: AtomicU64,
}

/// Results of the checks since [`Taps::forget_checks`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Checks {
    pub(super) checked: u64,
    pub(super) wrong: u64,
    pub(super) other_source: u64,
}

/// TAPs and the thread that reads them.
pub(super) struct Taps {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

impl Taps {
    /// Opens TAPs in the calling thread's namespace and starts to read them.
    pub(super) fn open(names: &[String]) -> Result<Self> {
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

    /// Returns the number of the stream's packets so far, summed over all TAPs.
    pub(super) fn delivered(&self) -> u64 {
        self.shared.delivered.load(Ordering::Relaxed)
    }

    /// Makes the reader wait for [`Taps::take`] if `held` is true, and lets the reader continue
    /// otherwise.
    pub(super) fn hold(&self, held: bool) {
        self.shared.held.store(held, Ordering::Relaxed);
        if let Some(reader) = &self.reader {
            reader.thread().unpark();
        }
    }

    /// Makes a held reader take all waiting frames.
    pub(super) fn take(&self) {
        self.shared.released.fetch_add(1, Ordering::Relaxed);
        if let Some(reader) = &self.reader {
            reader.thread().unpark();
        }
    }

    /// Sets whether the reader checks every packet or one of [`CHECKED`].
    pub(super) fn check_all(&self, all: bool) {
        self.shared.check_all.store(all, Ordering::Relaxed);
    }

    pub(super) fn forget_checks(&self) {
        for count in [
            &self.shared.checked,
            &self.shared.wrong,
            &self.shared.other_source,
        ] {
            count.store(0, Ordering::Relaxed);
        }
    }

    pub(super) fn checks(&self) -> Checks {
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

/// Waits until a TAP has frames, at most for [`WAIT`]. Returns which TAPs have frames.
fn ready(files: &[File]) -> Vec<bool> {
    let fds = files
        .iter()
        .map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN));
    let mut fds: Vec<PollFd<'_>> = fds.collect();
    // A signal may end the wait early, like the timeout.
    let _ = poll(
        &mut fds,
        PollTimeout::try_from(WAIT).unwrap_or(PollTimeout::ZERO),
    );
    fds.iter().map(|fd| fd.any().unwrap_or(false)).collect()
}

/// Takes all waiting frames of the TAPs.
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
