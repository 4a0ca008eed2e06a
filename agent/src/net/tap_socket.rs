//! Puts frames into a TAP's queue directly, bypassing its qdisc and the egress programs
//! (`packet(7)`, `PACKET_QDISC_BYPASS`).

use std::io;

use linux::packet_socket::PacketSocket;

/// A packet socket bound to one TAP; sends only.
#[derive(Debug)]
pub struct TapSocket {
    socket: PacketSocket,
}

/// Outcome of [`TapSocket::send`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The frame is in the queue.
    Queued,
    /// The queue is full; the frame is dropped.
    Full,
}

impl TapSocket {
    /// Opens a socket on a TAP of the calling thread's network namespace. The socket receives
    /// nothing.
    ///
    /// # Errors
    ///
    /// The error of the kernel; the call needs `CAP_NET_RAW`.
    pub fn open(ifindex: u32) -> io::Result<Self> {
        let socket = PacketSocket::past_qdisc(ifindex)?;
        Ok(Self { socket })
    }

    /// Puts a frame into the queue.
    ///
    /// # Errors
    ///
    /// The error of the kernel, for instance that the TAP no longer exists.
    pub fn send(&self, frame: &[u8]) -> io::Result<Sent> {
        match self.socket.send(frame) {
            Ok(_) => Ok(Sent::Queued),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOBUFS | libc::EAGAIN) => Ok(Sent::Full),
                _ => Err(error),
            },
        }
    }
}
