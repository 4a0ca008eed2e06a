//! What sends: `sendmmsg`, at a fixed rate or as fast as it can.

use std::io;
use std::net::SocketAddrV6;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::net::if_::if_nametoindex;
use nix::sys::prctl::set_timerslack;
use socket2::{Domain, Protocol, Socket, Type};

use super::mmsg::{BATCH, Repeated};

/// Most packets under way at full speed: fewer than any queue holds.
const WINDOW: u64 = 128;
/// Pause of a sender whose packets are all under way.
const PAUSE: Duration = Duration::from_micros(100);
/// Packets that are under way for so long are lost.
const LOST: Duration = Duration::from_millis(5);
/// Most packets that are sent at once when the sender did not run in time. What is due beyond
/// them it does not make up for: that would overrun queues.
const MOST: u64 = 64;

pub struct Sender {
    socket: Socket,
    packets: Repeated,
}

/// A socket that sends by an interface of the calling thread's namespace, wherever it is used.
pub fn socket(interface: &str, from: SocketAddrV6, to: SocketAddrV6) -> Result<Socket> {
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
    pub fn new(socket: Socket, payload_bytes: usize) -> Self {
        let payload = (0..payload_bytes).map(|it| (it * 31 + 7) as u8).collect();
        Self {
            socket,
            packets: Repeated::new(payload),
        }
    }

    /// Sends some packets at once.
    pub fn burst(&mut self, mut count: usize) -> Result<()> {
        while count > 0 {
            count -= self.batch(count)?;
        }
        Ok(())
    }

    /// Sends evenly spaced packets for some time, as a stream of constant bitrate has them; returns
    /// how many.
    pub fn paced(&mut self, per_second: u32, time: Duration) -> Result<u64> {
        pace(per_second, time, |count| self.burst(count))
    }

    /// Sends as fast as it can for some time. With `delivered`, which says how many packets have
    /// got through so far, never more than [`WINDOW`] are under way; without, all of them get
    /// through while they are sent.
    pub fn at_full_speed(
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
            // What a full queue swallows is lost like what it drops.
            Err(error) if is_loss(&error) => Ok(count),
            Err(error) => Err(error).context("Failed to send"),
        }
    }
}

/// Does what the pacing of a sender does, and sends nothing.
pub fn idle(per_second: u32, time: Duration) -> Result<u64> {
    pace(per_second, time, |_| Ok(()))
}

fn pace(per_second: u32, time: Duration, mut send: impl FnMut(usize) -> Result<()>) -> Result<u64> {
    // The kernel would let a sleeper be 50 microseconds late.
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

/// Whether the packets were not sent, or the receiver was not there yet when earlier ones came.
fn is_loss(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ECONNREFUSED)
    )
}
