//! Frames to the host: numbered, and kept for a while in case the host misses some.

use std::{
    collections::VecDeque,
    fs::File,
    io::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context as _, Result};
use lab::guest::wire::{FromGuest, frame::frame};

/// Frames kept, in bytes: seconds of the densest stream.
const RETAINED_BYTES: usize = 2 * 1024 * 1024;

/// The sending half of the control channel.
pub(crate) struct Outbox {
    inner: Mutex<Inner>,
}

struct Inner {
    port: File,
    next_number: u32,
    retained: VecDeque<(u32, Vec<u8>)>,
    retained_bytes: usize,
    was_idle: bool,
}

impl Outbox {
    pub(crate) fn new(port: File) -> Self {
        Self {
            inner: Mutex::new(Inner {
                port,
                next_number: 0,
                retained: VecDeque::new(),
                retained_bytes: 0,
                was_idle: true,
            }),
        }
    }

    /// Sends a message; waits while the host does not take it.
    pub(crate) fn send(&self, message: &FromGuest) -> Result<()> {
        let (kind, payload) = message.encode().context("Cannot encode a message")?;
        let mut inner = self.lock();
        let number = inner.next_number;
        inner.next_number = number.wrapping_add(1);
        inner.was_idle = false;
        let bytes = frame(kind, number, &payload);
        inner
            .port
            .write_all(&bytes)
            .context("Cannot write to the control channel")?;
        inner.retained_bytes += bytes.len();
        inner.retained.push_back((number, bytes));
        while inner.retained_bytes > RETAINED_BYTES
            && let Some((_, oldest)) = inner.retained.pop_front()
        {
            inner.retained_bytes -= oldest.len();
        }
        Ok(())
    }

    /// Sends a message from a thread that has nobody to return an error to.
    pub(crate) fn send_or_log(&self, message: &FromGuest) {
        if let Err(error) = self.send(message) {
            eprintln!("guest: {error:#}");
        }
    }

    /// Sends the frames `from..to` again, as far as they are kept.
    pub(crate) fn resend(&self, from: u32, to: u32) {
        let mut inner = self.lock();
        let Inner { port, retained, .. } = &mut *inner;
        for (number, bytes) in retained.iter() {
            if (from..to).contains(number)
                && let Err(error) = port.write_all(bytes)
            {
                eprintln!("guest: Cannot repeat frame {number}: {error}");
                return;
            }
        }
    }

    /// Returns whether nothing was sent since the last call.
    pub(crate) fn was_idle(&self) -> bool {
        std::mem::replace(&mut self.lock().was_idle, true)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing panics while holding the lock, and a half-written frame is found by its CRC.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
