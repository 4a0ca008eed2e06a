//! Frames put on an interface as they are.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test files, each of which uses a part"
)]
#![allow(clippy::expect_used, reason = "a test that cannot go on panics")]
#![allow(
    unsafe_code,
    reason = "nix has neither an address of this family nor this option"
)]

use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;

use socket2::{Domain, Protocol, Socket, Type};

/// `PACKET_QDISC_BYPASS` of `if_packet.h`.
const QDISC_BYPASS: libc::c_int = 20;

/// A packet socket on one interface, in the namespace of the thread that made it.
pub(crate) struct Wire(Socket);

impl Wire {
    /// Frames go the usual way out, past the programs at egress.
    pub(crate) fn new(ifindex: u32) -> Self {
        let socket =
            Socket::new(Domain::PACKET, Type::RAW, None::<Protocol>).expect("AF_PACKET socket");
        // SAFETY: an all-zero address is valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = ifindex.cast_signed();
        // SAFETY: the address is live and of the length that is given.
        let bound = unsafe {
            libc::bind(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
        Self(socket)
    }

    /// Frames go straight to the device.
    pub(crate) fn past_programs(ifindex: u32) -> Self {
        let wire = Self::new(ifindex);
        let on: libc::c_int = 1;
        // SAFETY: the option is live and of the length that is given.
        let set = unsafe {
            libc::setsockopt(
                wire.0.as_raw_fd(),
                libc::SOL_PACKET,
                QDISC_BYPASS,
                (&raw const on).cast(),
                size_of_val(&on) as u32,
            )
        };
        assert_eq!(set, 0, "setsockopt: {}", io::Error::last_os_error());
        wire
    }

    /// Takes frames in, too.
    pub(crate) fn listening(ifindex: u32) -> Self {
        let wire = Self::new(ifindex);
        // SAFETY: an all-zero address is valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = ifindex.cast_signed();
        // SAFETY: the address is live and of the length that is given.
        let bound = unsafe {
            libc::bind(
                wire.0.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
        wire.0.set_nonblocking(true).expect("non-blocking socket");
        wire
    }

    /// Frames that have come in or gone out since the last call.
    pub(crate) fn received(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut frame = vec![0; 65_536];
        while let Ok(length) = (&self.0).read(&mut frame) {
            frames.push(frame[..length].to_vec());
        }
        frames
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        let sent = self.0.send(frame).expect("frame sent");
        assert_eq!(sent, frame.len());
    }

    /// The same where the device may have no room, or a program may drop the frame, which is told.
    pub(crate) fn try_send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame).map(drop)
    }
}
