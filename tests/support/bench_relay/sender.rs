//! Senders: `sendmmsg` at a fixed rate or as fast as possible.

use std::io;
use std::net::SocketAddrV6;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::net::if_::if_nametoindex;
use nix::sys::prctl::set_timerslack;
use socket2::{Domain, Protocol, Socket, Type};

use super::mmsg::{BATCH, Repeated};

/// Limit of packets in flight at full speed: fewer than any queue holds.
const WINDOW: u64 = 128;
/// Pause of a sender whose window is full.
const PAUSE: Duration = Duration::from_micros(100);
/// Time without progress after which the packets in flight count as lost.
const LOST: Duration = Duration::from_millis(5);
/// Limit of packets that a delayed sender sends at once. The sender skips further packets that are
/// due, because they would overrun queues.
const MOST: u64 = 64;

pub(super) struct Sender {
    socket: Socket,
    packets: Repeated,
}

/// Returns a socket that sends out of an interface of the calling thread's namespace. Any thread
/// may use the socket.
pub(super) fn socket(interface: &str, from: SocketAddrV6, to: SocketAddrV6) -> Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))
        .context("Failed to make a socket")?;
    let index = if_nametoindex(interface)
        .with_context(|| format!("Failed to find interface {interface}"))?;
    let prepared = (|| {
        socket.set_multicast_if_v6(index)?;
        socket.set_multicast_loop_v6(false)?;
        socket.set_multicast_hops_v6(16)?;
        socket.bind(&from.into())?;
        socket.connect(&to.into())
    })();
    prepared.with_context(|| format!("Failed to send from {from} to {to}"))?;
    Ok(socket)
}

impl Sender {
    pub(super) fn new(socket: Socket, payload_bytes: usize) -> Self {
        let payload = (0..payload_bytes).map(|it| (it * 31 + 7) as u8).collect();
        Self {
            socket,
            packets: Repeated::new(payload),
        }
    }

    /// Sends `count` packets at once.
    pub(super) fn burst(&mut self, mut count: usize) -> Result<()> {
        while count > 0 {
            count -= self.batch(count)?;
        }
        Ok(())
    }

    /// Sends evenly spaced packets for `time`, like a stream of constant bitrate. Returns the
    /// number of packets.
    pub(super) fn paced(&mut self, per_second: u32, time: Duration) -> Result<u64> {
        pace(per_second, time, |count| self.burst(count))
    }

    /// Sends as fast as possible for `time`. `delivered` returns the number of packets delivered so
    /// far and limits the packets in flight to [`WINDOW`]. Without `delivered`, the network
    /// delivers each packet within the system call that sends it.
    pub(super) fn at_full_speed(
        &mut self,
        time: Duration,
        delivered: Option<&dyn Fn() -> u64>,
    ) -> Result<()> {
        let start = Instant::now();
        let through = || delivered.map_or(0, |delivered| delivered());
        let (mut sent, mut base) = (0, through());
        let mut progress = (base, start);
        loop {
            let now = Instant::now();
            if now - start >= time {
                return Ok(());
            }
            let through = through();
            if delivered.is_none() || sent + BATCH as u64 <= through - base + WINDOW {
                sent += self.batch(BATCH)? as u64;
                progress = (through, now);
            } else if through != progress.0 {
                progress = (through, now);
                thread::sleep(PAUSE);
            } else if now - progress.1 < LOST {
                thread::sleep(PAUSE);
            } else {
                (sent, base) = (0, through);
            }
        }
    }

    fn batch(&mut self, count: usize) -> Result<usize> {
        match self.packets.send(&self.socket, count) {
            Ok(sent) => Ok(sent),
            // A packet that a full queue refuses is lost, like a packet that the queue drops.
            Err(error) if is_loss(&error) => Ok(count),
            Err(error) => Err(error).context("Failed to send"),
        }
    }
}

/// Paces like a sender but sends nothing.
pub(super) fn idle(per_second: u32, time: Duration) -> Result<u64> {
    pace(per_second, time, |_| Ok(()))
}

fn pace(per_second: u32, time: Duration, mut send: impl FnMut(usize) -> Result<()>) -> Result<u64> {
    // The default timer slack delays a sleeper by 50 microseconds.
    set_timerslack(1).context("Failed to set the precision of timers")?;
    let space = Duration::from_secs(1) / per_second;
    let start = Instant::now();
    let (mut sent, mut missed) = (0, 0);
    loop {
        let elapsed = start.elapsed();
        if elapsed >= time {
            return Ok(sent);
        }
        let due = (elapsed.as_nanos() / space.as_nanos()) as u64 + 1 - sent - missed;
        let count = due.min(MOST);
        send(count as usize)?;
        sent += count;
        missed += due - count;
        let next = start + space * u32::try_from(sent + missed).unwrap_or(u32::MAX);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

/// Returns true if the packets were not sent, or if the receiver of earlier packets did not exist
/// yet.
fn is_loss(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ECONNREFUSED)
    )
}
