//! Frames put into a TAP's queue from here, past its qdisc and the programs on its way out
//! (`packet(7)`, `PACKET_QDISC_BYPASS`).

use std::io;

use linux::packet_socket::PacketSocket;

/// A packet socket on one TAP.
#[derive(Debug)]
pub struct TapSocket {
    socket: PacketSocket,
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is in the queue.
    Queued,
    /// The queue is full.
    Full,
}

impl TapSocket {
    /// Opens a socket on a TAP of the calling thread's network namespace. It receives nothing.
    ///
    /// # Errors
    ///
    /// What the kernel says; it needs `CAP_NET_RAW`.
    pub fn open(ifindex: u32) -> io::Result<Self> {
        let socket = PacketSocket::past_qdisc(ifindex)?;
        Ok(Self { socket })
    }

    /// Puts a frame into the queue.
    ///
    /// # Errors
    ///
    /// What the kernel says, for instance that the TAP is gone.
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
