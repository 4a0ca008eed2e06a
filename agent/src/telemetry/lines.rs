//! The log's lines on their way to standard error.
//!
//! Standard error is often a pipe, whose reader may stop or leave. No caller waits for the reader:
//! a thread writes, and lines that find the buffer full, or that cannot be written, are dropped and
//! counted.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Size of the buffer, bytes.
const ROOM: usize = 1 << 20;

/// Buffer of lines that wait for the thread.
#[derive(Clone, Debug)]
pub(super) struct Lines(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Signals a new line, or that everything is written.
    changed: Condvar,
    dropped: AtomicU64,
    room: usize,
}

#[derive(Debug, Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// True while the thread writes a line.
    busy: bool,
}

impl Lines {
    /// Starts the thread that writes to `out`.
    pub(super) fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        Self::with_room(out, ROOM)
    }

    fn with_room(out: impl Write + Send + 'static, room: usize) -> io::Result<Self> {
        let lines = Self(Arc::new(Shared {
            queue: Mutex::default(),
            changed: Condvar::new(),
            dropped: AtomicU64::new(0),
            room,
        }));
        let writer = lines.clone();
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || writer.write_to(out))?;
        Ok(lines)
    }

    /// Returns the number of dropped lines.
    pub(super) fn dropped(&self) -> u64 {
        self.0.dropped.load(Ordering::Relaxed)
    }

    /// Waits until everything is written, at most for `patience`.
    pub(super) fn flush(&self, patience: Duration) {
        let is_busy = |queue: &mut Queue| queue.busy || !queue.lines.is_empty();
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.lock(), patience, is_busy);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    fn push(&self, line: &[u8]) {
        let mut queue = self.lock();
        if queue.bytes + line.len() > self.0.room {
            drop(queue);
            self.0.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        queue.bytes += line.len();
        queue.lines.push_back(line.to_vec());
        drop(queue);
        self.0.changed.notify_all();
    }

    /// Writes lines for ever.
    fn write_to(&self, mut out: impl Write) {
        let mut told = 0;
        loop {
            let line = self.next();
            let written = out.write_all(&line).and_then(|()| out.flush());
            if written.is_err() {
                self.0.dropped.fetch_add(1, Ordering::Relaxed);
            } else if self.dropped() > told {
                let dropped = self.dropped();
                // This warning returns here as a line.
                tracing::warn!(
                    lines = dropped - told,
                    "Lines of this log were dropped: its reader stood still, or was away"
                );
                told = dropped;
            }
        }
    }

    /// Waits for the next line.
    fn next(&self) -> Vec<u8> {
        let mut queue = self.lock();
        queue.busy = false;
        self.0.changed.notify_all();
        loop {
            if let Some(line) = queue.lines.pop_front() {
                queue.bytes -= line.len();
                queue.busy = true;
                return line;
            }
            let woken = self.0.changed.wait(queue);
            queue = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        let locked = self.0.queue.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }
}

/// Each write is a whole event.
impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Lines {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Read as _, pipe};
    use std::time::Instant;

    use super::*;

    /// Creates lines that go into a pipe.
    fn piped(room: usize) -> (Lines, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        (Lines::with_room(writer, room).unwrap(), reader)
    }

    #[test]
    fn lines_come_in_their_order() {
        let (mut lines, mut reader) = piped(ROOM);
        for number in 0..100 {
            writeln!(lines, "{number}").unwrap();
        }
        lines.flush(Duration::from_secs(20));
        drop(lines);
        let mut read = [0; 190 + 100];
        reader.read_exact(&mut read).unwrap();
        let text = String::from_utf8_lossy(&read);
        assert!(text.lines().map(|it| it.parse::<u32>().unwrap()).eq(0..100));
    }

    #[test]
    fn reader_that_stands_still_costs_lines_and_no_time() {
        let (mut lines, mut reader) = piped(10_000);
        let line = [b'x'; 1000];
        // More than the pipe and the buffer hold; nobody reads.
        for _ in 0..1000 {
            lines.write_all(&line).unwrap();
        }
        assert!(lines.dropped() > 800, "{}", lines.dropped());
        // Once the reader continues, waiting lines and new lines arrive.
        let before = lines.dropped();
        let mut kept = vec![0; (1000 - usize::try_from(before).unwrap()) * line.len()];
        reader.read_exact(&mut kept).unwrap();
        lines.flush(Duration::from_secs(20));
        lines.write_all(b"new").unwrap();
        let mut new = [0; 3];
        reader.read_exact(&mut new).unwrap();
        assert_eq!((&new, lines.dropped()), (b"new", before));
    }

    #[test]
    fn reader_that_goes_away_costs_lines_only() {
        let (mut lines, reader) = piped(ROOM);
        drop(reader);
        for _ in 0..10 {
            lines.write_all(b"line\n").unwrap();
        }
        lines.flush(Duration::from_secs(20));
        assert_eq!(lines.dropped(), 10);
    }

    #[test]
    fn flush_gives_up() {
        let (mut lines, _reader) = piped(1 << 20);
        lines.write_all(&[b'x'; 1 << 20]).unwrap();
        let before = Instant::now();
        lines.flush(Duration::from_millis(10));
        assert!(before.elapsed() >= Duration::from_millis(10));
    }
}
