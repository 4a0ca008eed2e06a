//! Packet sockets: complete frames of one interface (`packet(7)`).
//!
//! On a bridge port, the socket receives a frame before the bridge does.
#![allow(
    unsafe_code,
    reason = "packet sockets are bound by an address that has no safe form"
)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use socket2::{Domain, SockFilter, Socket, Type};

use crate::socket_option;

/// `PACKET_IGNORE_OUTGOING` (Linux 4.20): the socket does not receive frames that this host sends.
const IGNORE_OUTGOING: libc::c_int = 23;

/// An instruction of a classic BPF program; `socket2` keeps the fields of its own type private.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// Opcode of the instruction.
    pub code: u16,
    /// Instructions to skip if the comparison holds.
    pub jt: u8,
    /// Instructions to skip if the comparison does not hold.
    pub jf: u8,
    /// Constant operand.
    pub k: u32,
}

/// A socket on one interface, in the network namespace that it was opened in. Opening a socket
/// needs `CAP_NET_RAW`.
#[derive(Debug)]
pub struct PacketSocket(Socket);

impl PacketSocket {
    /// Opens a socket that only sends, through the interface's qdisc and egress programs. Sending
    /// blocks while the buffer is full.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn sending(ifindex: u32) -> io::Result<Self> {
        let socket = unbound()?;
        bind(&socket, ifindex, 0)?;
        Ok(Self(socket))
    }

    /// Opens a socket that only sends, bypassing the interface's qdisc and egress programs
    /// (`PACKET_QDISC_BYPASS`). Never blocks.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn past_qdisc(ifindex: u32) -> io::Result<Self> {
        let socket = unbound()?;
        socket.set_nonblocking(true)?;
        set(&socket, libc::PACKET_QDISC_BYPASS)?;
        bind(&socket, ifindex, 0)?;
        Ok(Self(socket))
    }

    /// Opens a socket that receives the frames which arrive on the interface and pass a filter
    /// program. Never blocks.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
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

    /// Opens a socket that receives all frames which the interface receives or sends. Never blocks.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn listening(ifindex: u32) -> io::Result<Self> {
        let socket = unbound()?;
        socket.set_nonblocking(true)?;
        bind(&socket, ifindex, all_protocols())?;
        Ok(Self(socket))
    }

    /// Sets whether calls return instead of waiting.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
        self.0.set_nonblocking(nonblocking)
    }

    /// Registers the socket with the tokio runtime for reading.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    #[cfg(feature = "tokio")]
    pub fn watch(self) -> io::Result<tokio::io::unix::AsyncFd<Self>> {
        use tokio::io::Interest;
        use tokio::io::unix::AsyncFd;
        // SAFETY: the socket is open, keeps its descriptor, and owns it until it is dropped.
        let watched = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        watched.map_err(io::Error::from)
    }

    /// Receives a frame, truncated to the buffer; returns the number of bytes.
    ///
    /// # Errors
    ///
    /// The error of the kernel; `WouldBlock` if no frame waits.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: initialized bytes are valid as `MaybeUninit`, and `recv` only writes to them.
        let buffer = unsafe { &mut *(&raw mut *buffer as *mut [MaybeUninit<u8>]) };
        self.0.recv(buffer)
    }

    /// Sends a frame from the interface; returns the number of bytes.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
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

/// Opens a socket that receives nothing until it is bound to a protocol.
fn unbound() -> io::Result<Socket> {
    Socket::new(Domain::PACKET, Type::RAW.cloexec(), None)
}

fn set(socket: &Socket, option: libc::c_int) -> io::Result<()> {
    socket_option::set_number(socket, libc::SOL_PACKET, option, 1)
}

/// `ETH_P_ALL`: only sockets for all protocols receive the frames of a port before its bridge.
fn all_protocols() -> u16 {
    u16::try_from(libc::ETH_P_ALL).unwrap_or_default()
}

/// Binds a socket to an interface of the calling thread's network namespace, and to an EtherType;
/// with 0 the socket only sends.
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
    // SAFETY: the address is live, and the length given is its size.
    let result = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
