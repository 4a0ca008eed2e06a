//! What sends: `sendmmsg`, at a fixed rate or as fast as it can.

use std::io;
use std::net::SocketAddrV6;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, Socket, Type};

use super::mmsg::{BATCH, Repeated};

/// A fixed rate is kept by so many bursts a second, as streams of some video packets a frame or
/// a paced sender of many streams come.
const TICK: Duration = Duration::from_millis(1);

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

    /// Sends at a rate for some time; returns how many packets.
    pub fn paced(&mut self, per_second: u32, time: Duration) -> Result<u64> {
        let start = Instant::now();
        let mut sent = 0;
        let mut next = start;
        loop {
            let elapsed = start.elapsed().min(time);
            let due = (elapsed.as_secs_f64() * f64::from(per_second)) as u64;
            self.burst((due - sent) as usize)?;
            sent = due;
            if elapsed == time {
                return Ok(sent);
            }
            next += TICK;
            thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }

    /// Sends as fast as it can until a moment.
    pub fn flat_out(&mut self, until: Instant) -> Result<()> {
        while Instant::now() < until {
            self.batch(BATCH)?;
        }
        Ok(())
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

/// Whether the packets were not sent, or the receiver was not there yet when earlier ones came.
fn is_loss(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ECONNREFUSED)
    )
}
