//! Frames as they come in by one interface, chosen by a program of the classic filter in the kernel.
//!
//! An interface that is a port of a bridge is heard before the bridge has its frames.
#![allow(
    unsafe_code,
    reason = "packet sockets are bound by an address and have options that have no safe form"
)]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use common::wire::neighbour::{ADVERTISEMENT, ICMPV6, SOLICITATION};
use socket2::{Domain, SockFilter, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `PACKET_IGNORE_OUTGOING` (Linux 4.20).
const IGNORE_OUTGOING: libc::c_int = 23;
const PASS_ALL: u32 = u32::MAX;
const IPV6: u32 = 0x86dd;
/// `SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT`: whether the tag was taken out of the frame.
const TAG_PRESENT: u32 = (-0x1000_i32 + 48).cast_unsigned();

/// Receives some of the frames of an interface, and sends any.
#[derive(Debug)]
pub struct PacketSocket {
    socket: Socket,
}

/// Which frames. None of them has a VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Neighbor Solicitations and Advertisements.
    Neighbours,
    /// Neighbor Solicitations to one node, as they come when a neighbour is about to be forgotten.
    UnicastSolicitations,
    /// IPv6 packets from an address.
    From(Ipv6Addr),
}

impl PacketSocket {
    /// Opens a socket on an interface of the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// What the kernel says; it needs `CAP_NET_RAW`.
    pub fn open(ifindex: u32, wanted: Wanted) -> io::Result<Self> {
        let socket = unbound(IGNORE_OUTGOING)?;
        let program: Vec<SockFilter> = filter(wanted)
            .into_iter()
            .map(|it| SockFilter::new(it.code, it.jt, it.jf, it.k))
            .collect();
        socket.attach_filter(&program)?;
        // Only what wants everything hears the frames of a port before its bridge.
        let protocol = u16::try_from(libc::ETH_P_ALL).unwrap_or_default();
        bind(&socket, ifindex, protocol)?;
        Ok(Self { socket })
    }

    /// Has the runtime wait for frames.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn watch(self) -> io::Result<AsyncFd<Self>> {
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
        self.socket.recv(buffer)
    }

    /// Sends a frame out of the interface.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.socket.send(frame).map(drop)
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// A packet socket with an option switched on. It receives nothing until it is bound to a protocol.
pub(super) fn unbound(option: libc::c_int) -> io::Result<Socket> {
    let socket = Socket::new(Domain::PACKET, Type::RAW.cloexec().nonblocking(), None)?;
    let on: libc::c_int = 1;
    // SAFETY: the option's value is a live integer, whose size is given.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            option,
            (&raw const on).cast(),
            length(size_of::<libc::c_int>()),
        )
    };
    match result {
        0 => Ok(socket),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Binds a packet socket to an interface of the calling thread's network namespace, and to frames
/// of an EtherType; with 0 it sends only.
pub(super) fn bind(socket: &Socket, ifindex: u32, protocol: u16) -> io::Result<()> {
    let address = libc::sockaddr_ll {
        sll_family: libc::sa_family_t::try_from(libc::AF_PACKET).unwrap_or_default(),
        sll_protocol: protocol.to_be(),
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
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn length(bytes: usize) -> libc::socklen_t {
    libc::socklen_t::try_from(bytes).unwrap_or_default()
}

/// One of the filter; `socket2` does not show what its own holds.
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u16,
    jt: u8,
    jf: u8,
    k: u32,
}

/// Where the program that is being written goes on when a comparison fails: to its end.
struct Program(Vec<Step>);

enum Step {
    Load(u16, u32),
    /// Goes on if the value equals; drops the frame if not.
    Equal(u32),
    /// Goes on if the value does not equal.
    Unequal(u32),
    /// Goes on if it equals one of both.
    Either(u32, u32),
}

const WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const HALF: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_ABS) as u16;
const BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
const JUMP_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

fn filter(wanted: Wanted) -> Vec<Instruction> {
    let mut steps = vec![
        Step::Load(BYTE, TAG_PRESENT),
        Step::Equal(0),
        Step::Load(HALF, 12),
        Step::Equal(IPV6),
    ];
    match wanted {
        Wanted::Neighbours => steps.extend([
            Step::Load(BYTE, 20),
            Step::Equal(ICMPV6.into()),
            Step::Load(BYTE, 54),
            Step::Either(SOLICITATION.into(), ADVERTISEMENT.into()),
        ]),
        Wanted::UnicastSolicitations => steps.extend([
            Step::Load(BYTE, 20),
            Step::Equal(ICMPV6.into()),
            Step::Load(BYTE, 54),
            Step::Equal(SOLICITATION.into()),
            Step::Load(BYTE, 38),
            Step::Unequal(0xff),
        ]),
        Wanted::From(address) => {
            let octets = address.octets();
            let (words, _) = octets.as_chunks::<4>();
            for (word, at) in words.iter().zip((22..).step_by(4)) {
                steps.push(Step::Load(WORD, at));
                steps.push(Step::Equal(u32::from_be_bytes(*word)));
            }
        }
    }
    Program(steps).assemble()
}

impl Program {
    fn assemble(&self) -> Vec<Instruction> {
        let step = |code, jt, jf, k| Instruction { code, jt, jf, k };
        let length = |it: &Step| match it {
            Step::Load(..) | Step::Equal(_) | Step::Unequal(_) => 1,
            Step::Either(..) => 2,
        };
        let total: u8 = self.0.iter().map(length).sum();
        let mut program = Vec::with_capacity(usize::from(total) + 2);
        let mut at = 0_u8;
        for it in &self.0 {
            at += length(it);
            // The frame is dropped behind the one instruction that passes it.
            let drop = total - at + 1;
            match *it {
                Step::Load(code, k) => program.push(step(code, 0, 0, k)),
                Step::Equal(k) => program.push(step(JUMP_EQUAL, 0, drop, k)),
                Step::Unequal(k) => program.push(step(JUMP_EQUAL, drop, 0, k)),
                Step::Either(one, other) => {
                    program.push(step(JUMP_EQUAL, 1, 0, one));
                    program.push(step(JUMP_EQUAL, 0, drop, other));
                }
            }
        }
        program.push(step(RETURN, 0, 0, PASS_ALL));
        program.push(step(RETURN, 0, 0, 0));
        program
    }
}

#[cfg(test)]
mod tests {
    use common::wire::neighbour::{Audience, advertisement, probe};

    use super::*;

    /// Runs a program as the kernel would, without tag.
    fn passes(wanted: Wanted, frame: &[u8]) -> bool {
        let program = filter(wanted);
        let (mut at, mut value) = (0, 0_u32);
        loop {
            let it = &program[at];
            at += 1;
            let bytes = |length: usize| {
                let start = it.k as usize;
                frame.get(start..start + length).map(|bytes| {
                    bytes
                        .iter()
                        .fold(0, |sum, byte| sum << 8 | u32::from(*byte))
                })
            };
            let loaded = match it.code {
                WORD => bytes(4),
                HALF => bytes(2),
                BYTE if it.k == TAG_PRESENT => Some(0),
                BYTE => bytes(1),
                JUMP_EQUAL => {
                    at += usize::from(if value == it.k { it.jt } else { it.jf });
                    continue;
                }
                _ => return it.k != 0,
            };
            let Some(loaded) = loaded else {
                return false;
            };
            value = loaded;
        }
    }

    #[test]
    fn filter_passes_what_is_wanted_only() {
        let target = "2001:db8::5".parse::<Ipv6Addr>().unwrap().octets();
        let asks = probe(&target, [2; 6], [0; 6]);
        let source = "fe80::1".parse::<Ipv6Addr>().unwrap().octets();
        let says = advertisement(&target, [2; 6], true, &source, [2; 6], Audience::Everybody);
        let mut asks_one = asks;
        asks_one[38] = 0x20;
        let mut other = asks;
        other[54] = 134;
        for (wanted, expected) in [
            (Wanted::Neighbours, [true, true, true, false]),
            (Wanted::UnicastSolicitations, [false, false, true, false]),
            (
                Wanted::From("fe80::1".parse().unwrap()),
                [false, true, false, false],
            ),
            (Wanted::From("fe80::2".parse().unwrap()), [false; 4]),
        ] {
            let frames = [asks, says, asks_one, other];
            assert_eq!(frames.map(|frame| passes(wanted, &frame)), expected);
            assert!(!passes(wanted, &asks[..30]), "a short frame");
        }
    }
}
