//! Frames of one interface, as they are (`packet(7)`).
//!
//! An interface that is a port of a bridge is heard before the bridge has its frames.
#![allow(
    unsafe_code,
    reason = "packet sockets are bound by an address that has no safe form"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use socket2::{Domain, SockFilter, Socket, Type};

use crate::socket_option;

/// `PACKET_IGNORE_OUTGOING` (Linux 4.20).
const IGNORE_OUTGOING: libc::c_int = 23;

/// An instruction of a classic BPF program; `socket2` does not show what its own holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Instructions to skip when a comparison holds.
    pub jt: u8,
    /// Instructions to skip when a comparison does not hold.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// A socket on one interface of the network namespace that the socket was opened in. Opening one takes
/// `CAP_NET_RAW`.
#[derive(Debug)]
pub struct PacketSocket(Socket);

impl PacketSocket {
    /// Sends only, by the interface's qdisc and the programs at its egress; waits for room.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn sending(ifindex: u32) -> io::Result<Self> {
        let socket = unbound()?;
        bind(&socket, ifindex, 0)?;
        Ok(Self(socket))
    }

    /// Sends only, past the interface's qdisc and the programs at its egress (`PACKET_QDISC_BYPASS`);
    /// never waits.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn past_qdisc(ifindex: u32) -> io::Result<Self> {
        let socket = unbound()?;
        socket.set_nonblocking(true)?;
        set(&socket, libc::PACKET_QDISC_BYPASS)?;
        bind(&socket, ifindex, 0)?;
        Ok(Self(socket))
    }

    /// Receives the frames that come in by the interface and that a program passes; never waits.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn filtered(ifindex: u32, program: &[Instruction]) -> io::Result<Self> {
        let socket = unbound()?;
        socket.set_nonblocking(true)?;
        set(&socket, IGNORE_OUTGOING)?;
        let program: Vec<SockFilter> = program
            .iter()
            .map(|it| SockFilter::new(it.code, it.jt, it.jf, it.k))
            .collect();
        socket.attach_filter(&program)?;
        bind(&socket, ifindex, all_protocols())?;
        Ok(Self(socket))
    }

    /// Receives all frames that come in or go out by the interface; never waits.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn listening(ifindex: u32) -> io::Result<Self> {
        let socket = unbound()?;
        socket.set_nonblocking(true)?;
        bind(&socket, ifindex, all_protocols())?;
        Ok(Self(socket))
    }

    /// Whether a call returns rather than waits.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.0.set_nonblocking(nonblocking)
    }

    /// Has the runtime wait for frames.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    #[cfg(feature = "tokio")]
    pub fn watch(self) -> io::Result<tokio::io::unix::AsyncFd<Self>> {
        use tokio::io::Interest;
        use tokio::io::unix::AsyncFd;
        // SAFETY: the socket is open, keeps its descriptor, and owns it until it is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        watched.map_err(io::Error::from)
    }

    /// Receives a frame, or its first bytes, and returns how many.
    ///
    /// # Errors
    ///
    /// What the kernel says, `WouldBlock` where there is none.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: bytes that are initialized may be seen as such that need not be, and receiving
        // only writes to them.
        let buffer = unsafe { &mut *(&raw mut *buffer as *mut [MaybeUninit<u8>]) };
        self.0.recv(buffer)
    }

    /// Sends a frame out of the interface; returns how many bytes.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn send(&self, frame: &[u8]) -> io::Result<usize> {
        self.0.send(frame)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A socket that receives nothing until it is bound to a protocol.
fn unbound() -> io::Result<Socket> {
    Socket::new(Domain::PACKET, Type::RAW.cloexec(), None)
}

fn set(socket: &Socket, option: libc::c_int) -> io::Result<()> {
    socket_option::set_number(socket, libc::SOL_PACKET, option, 1)
}

/// Only what wants everything hears the frames of a port before its bridge.
fn all_protocols() -> u16 {
    u16::try_from(libc::ETH_P_ALL).unwrap_or_default()
}

/// Binds to an interface of the calling thread's network namespace, and to frames of an EtherType; with
/// 0 the socket sends only.
fn bind(socket: &Socket, ifindex: u32, protocol: u16) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::sa_family_t::try_from(libc::AF_PACKET).unwrap_or_default(),
        sll_protocol: protocol.to_be(),
        sll_ifindex: i32::try_from(ifindex).map_err(|_| io::ErrorKind::InvalidInput)?,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or_default();
    // SAFETY: the address is live, and its size is given.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
