//! Frames put into a TAP's queue from here, past its qdisc and the programs on its way out
//! (`packet(7)`, `PACKET_QDISC_BYPASS`).
#![allow(
    unsafe_code,
    reason = "packet sockets are bound by an address that has no safe form"
)]

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use socket2::{Domain, Socket, Type};

/// A packet socket on one TAP.
#[derive(Debug)]
pub struct TapSocket {
    socket: Socket,
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
        let socket = Socket::new(Domain::PACKET, Type::RAW.cloexec().nonblocking(), None)?;
        let on: libc::c_int = 1;
        let length = |bytes: usize| libc::socklen_t::try_from(bytes).unwrap_or_default();
        // SAFETY: the option's value is a live integer, whose size is given.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_QDISC_BYPASS,
                (&raw const on).cast(),
                length(size_of::<libc::c_int>()),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let address = libc::sockaddr_ll {
            sll_family: libc::sa_family_t::try_from(libc::AF_PACKET).unwrap_or_default(),
            sll_protocol: 0,
            sll_ifindex: i32::try_from(ifindex).map_err(|_| io::ErrorKind::InvalidInput)?,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: the address is live, and its size is given.
        let result = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                length(size_of::<libc::sockaddr_ll>()),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
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
