//! Frames to the host: numbered, timestamped, and kept for a while in case the host misses some.
//!
//! A thread of its own writes the frames. The channel may stall for a while, above all around a
//! live migration, and an application that reports its reception must not wait for the channel.

use std::{
    collections::VecDeque,
    fs::File,
    io::Write as _,
    mem,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use lab::{
    guest::wire::{FromGuest, frame::frame},
    probe::clock,
};

/// Limit of frames kept for repetition, bytes: seconds of the densest stream.
const RETAINED_BYTES: usize = 2 * 1024 * 1024;
/// Limit of frames that wait to be written, bytes; beyond the limit, senders wait.
const UNWRITTEN_BYTES: usize = 8 * 1024 * 1024;

/// The sending half of the control channel.
pub(crate) struct Outbox {
    inner: Mutex<Inner>,
    /// Notified when there is something to write.
    added: Condvar,
    /// Notified when something was written.
    written: Condvar,
}

#[derive(Default)]
struct Inner {
    next_number: u32,
    retained: VecDeque<(u32, Vec<u8>)>,
    retained_bytes: usize,
    /// Complete frames, one after the other.
    unwritten: Vec<u8>,
    was_idle: bool,
    has_failed: bool,
}

impl Outbox {
    pub(crate) fn new(port: File) -> Arc<Self> {
        let outbox = Arc::new(Self {
            inner: Mutex::default(),
            added: Condvar::new(),
            written: Condvar::new(),
        });
        let writer = Arc::clone(&outbox);
        thread::spawn(move || writer.write(port));
        outbox
    }

    /// Sends a message about the present time.
    pub(crate) fn send(&self, message: &FromGuest) -> Result<()> {
        self.send_of(clock::now_ns(), message)
    }

    /// Sends a message about the time `guest_ns` of the guest's monotonic clock. Waits while more
    /// than [`UNWRITTEN_BYTES`] are unwritten.
    pub(crate) fn send_of(&self, guest_ns: u64, message: &FromGuest) -> Result<()> {
        let (kind, payload) = message.encode().context("Cannot encode a message")?;
        let mut inner = self.lock();
        while inner.unwritten.len() > UNWRITTEN_BYTES && !inner.has_failed {
            inner = self
                .written
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        ensure!(!inner.has_failed, "The control channel is broken");
        let number = inner.next_number;
        inner.next_number = number.wrapping_add(1);
        inner.was_idle = false;
        let bytes = frame(kind, number, guest_ns, &payload);
        inner.unwritten.extend_from_slice(&bytes);
        inner.retained_bytes += bytes.len();
        inner.retained.push_back((number, bytes));
        while inner.retained_bytes > RETAINED_BYTES
            && let Some((_, oldest)) = inner.retained.pop_front()
        {
            inner.retained_bytes -= oldest.len();
        }
        self.added.notify_one();
        Ok(())
    }

    /// Sends a message and logs an error, for threads that cannot return an error.
    pub(crate) fn send_or_log(&self, message: &FromGuest) {
        if let Err(error) = self.send(message) {
            eprintln!("guest: {error:#}");
        }
    }

    /// Sends the frames `from..to` again, as far as they are kept.
    pub(crate) fn resend(&self, from: u32, to: u32) {
        let mut inner = self.lock();
        let Inner {
            unwritten,
            retained,
            ..
        } = &mut *inner;
        for (number, bytes) in retained.iter() {
            if (from..to).contains(number) {
                unwritten.extend_from_slice(bytes);
            }
        }
        self.added.notify_one();
    }

    /// Returns true if nothing was sent since the last call.
    pub(crate) fn was_idle(&self) -> bool {
        mem::replace(&mut self.lock().was_idle, true)
    }

    /// Writes frames until the channel breaks.
    fn write(&self, mut port: File) {
        loop {
            let mut inner = self.lock();
            while inner.unwritten.is_empty() {
                inner = self
                    .added
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let bytes = mem::take(&mut inner.unwritten);
            drop(inner);
            if let Err(error) = port.write_all(&bytes) {
                eprintln!("guest: Cannot write to the control channel: {error}");
                self.lock().has_failed = true;
                self.written.notify_all();
                return;
            }
            self.written.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // No code panics while it holds the lock, and the CRC reveals a half-written frame.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
