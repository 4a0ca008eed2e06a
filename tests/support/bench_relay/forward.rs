//! Userspace relays written for speed, for comparison: a thread takes all waiting datagrams by
//! `recvmmsg` and forwards all of them by `sendmmsg`.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::net::if_::if_nametoindex;
use socket2::{Domain, Protocol, Socket, Type};

use super::mmsg::{FanOut, Received};

/// Requested receive buffer, bytes; the machine limits the buffer to `net.core.rmem_max`.
pub(super) const RECEIVE_BUFFER: usize = 4 << 20;

/// A relay on a thread of its own, which ends when the value is dropped.
pub(super) struct Forwarder {
    stop: Arc<AtomicBool>,
    forwarded: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    /// Starts a relay that receives at `at` and forwards each datagram to `to`, out of `interface`.
    pub(super) fn to_one(at: SocketAddrV6, to: SocketAddrV6, interface: &str) -> Result<Self> {
        let (incoming, outgoing) = (receiver(at)?, socket()?);
        let index = if_nametoindex(interface)
            .with_context(|| format!("Failed to find interface {interface}"))?;
        let prepared = (|| {
            outgoing.set_multicast_if_v6(index)?;
            outgoing.set_multicast_loop_v6(false)?;
            outgoing.connect(&to.into())
        })();
        prepared.with_context(|| format!("Failed to send to {to}"))?;
        Self::start(move || {
            let mut datagrams = Received::new();
            move || {
                let Ok(count) = datagrams.receive(&incoming) else {
                    return 0;
                };
                let _ = datagrams.send(&outgoing, count);
                count
            }
        })
    }

    /// Starts a relay that joins the multicast address `at` on `interface` and forwards each
    /// datagram to all addresses in `to`, from the address `from`.
    pub(super) fn to_many(
        at: SocketAddrV6,
        interface: &str,
        from: Ipv6Addr,
        to: Vec<SocketAddrV6>,
    ) -> Result<Self> {
        let (incoming, outgoing) = (receiver(at)?, socket()?);
        let index = if_nametoindex(interface)
            .with_context(|| format!("Failed to find interface {interface}"))?;
        incoming
            .join_multicast_v6(at.ip(), index)
            .with_context(|| format!("Failed to join {at}"))?;
        outgoing
            .bind(&SocketAddrV6::new(from, 0, 0, 0).into())
            .with_context(|| format!("Failed to bind {from}"))?;
        Self::start(move || {
            let mut datagrams = Received::new();
            let mut copies = FanOut::new(&to);
            move || {
                let Ok(count) = datagrams.receive(&incoming) else {
                    return 0;
                };
                for datagram in datagrams.datagrams(count) {
                    let _ = copies.send(&outgoing, datagram);
                }
                count
            }
        })
    }

    /// Returns the number of datagrams received and forwarded.
    pub(super) fn forwarded(&self) -> u64 {
        self.forwarded.load(Ordering::Relaxed)
    }

    /// Starts a thread that calls the closure from `make` repeatedly. Each call ends after some
    /// time and returns the number of datagrams that it has forwarded.
    fn start<S: FnMut() -> usize>(make: impl FnOnce() -> S + Send + 'static) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let forwarded = Arc::new(AtomicU64::new(0));
        let thread = thread::Builder::new().name("forward".to_owned()).spawn({
            let (stop, forwarded) = (Arc::clone(&stop), Arc::clone(&forwarded));
            move || {
                let mut step = make();
                while !stop.load(Ordering::Relaxed) {
                    forwarded.fetch_add(step() as u64, Ordering::Relaxed);
                }
            }
        });
        Ok(Self {
            stop,
            forwarded,
            thread: Some(thread.context("Failed to start a thread")?),
        })
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn socket() -> Result<Socket> {
    Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).context("Failed to make a socket")
}

fn receiver(at: SocketAddrV6) -> Result<Socket> {
    let socket = socket()?;
    let prepared = (|| {
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
        socket.bind(&at.into())
    })();
    prepared.with_context(|| format!("Failed to receive at {at}"))?;
    Ok(socket)
}
