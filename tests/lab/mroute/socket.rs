//! The kernel's IPv6 multicast routing socket (`include/uapi/linux/mroute6.h`).

#![allow(unsafe_code, reason = "MRT6_* socket options have no safe wrapper")]

use std::ffi::c_int;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};

use super::event::Flow;

const MRT6_INIT: c_int = 200;
const MRT6_ADD_MIF: c_int = 202;
const MRT6_ADD_MFC: c_int = 204;
/// `im6_msgtype` of an upcall for a packet without a route.
const MRT6MSG_NOCACHE: u8 = 1;

/// `struct mif6ctl`, the argument of `MRT6_ADD_MIF`.
#[repr(C)]
struct Mif6Ctl {
    mif: u16,
    flags: u8,
    threshold: u8,
    ifindex: u16,
    rate_limit: u32,
}

/// `struct mf6cctl`, the argument of `MRT6_ADD_MFC`. Bit `n` of `outgoing` stands for multicast
/// interface `n`.
#[repr(C)]
struct Mf6cCtl {
    origin: libc::sockaddr_in6,
    multicast_address: libc::sockaddr_in6,
    parent: u16,
    outgoing: [u32; 8],
}

/// Socket that owns the kernel's multicast routing. The kernel removes all routes when this socket
/// closes.
#[derive(Debug)]
pub(super) struct RoutingSocket {
    socket: OwnedFd,
}

impl AsFd for RoutingSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl RoutingSocket {
    /// Takes over multicast routing in the namespace of the calling thread.
    pub(super) fn open() -> Result<Self> {
        let socket = socket(
            AddressFamily::Inet6,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::IcmpV6,
        )
        .context("Failed to open a raw ICMPv6 socket: are you root?")?;
        setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20))
            .context("Failed to enlarge the receive buffer")?;
        let this = Self { socket };
        this.set(MRT6_INIT, &1i32)
            .context("Failed to take over multicast routing: is CONFIG_IPV6_MROUTE there?")?;
        Ok(this)
    }

    /// Registers an interface as multicast interface `mif`.
    pub(super) fn add_interface(&self, mif: u16, ifindex: u32) -> Result<()> {
        let ifindex = u16::try_from(ifindex)
            .context("Interface index above 65535: too large for multicast routing")?;
        let control = Mif6Ctl {
            mif,
            flags: 0,
            threshold: 1,
            ifindex,
            rate_limit: 0,
        };
        self.set(MRT6_ADD_MIF, &control)
            .with_context(|| format!("Failed to add interface {ifindex} to multicast routing"))
    }

    /// Installs or replaces the route of a flow.
    pub(super) fn set_route(
        &self,
        flow: Flow,
        incoming: u16,
        outgoing: impl Iterator<Item = u16>,
    ) -> Result<()> {
        let mut set = [0u32; 8];
        for mif in outgoing {
            if let Some(word) = set.get_mut(usize::from(mif / 32)) {
                *word |= 1 << (mif % 32);
            }
        }
        let control = Mf6cCtl {
            origin: socket_address(flow.source),
            multicast_address: socket_address(flow.multicast_address),
            parent: incoming,
            outgoing: set,
        };
        self.set(MRT6_ADD_MFC, &control).with_context(|| {
            format!(
                "Failed to route {} from {}",
                flow.multicast_address, flow.source
            )
        })
    }

    /// Reads the next upcall for a packet without a route. Returns the flow and the incoming
    /// multicast interface; `None` if no upcall is pending.
    pub(super) fn next_upcall(&self) -> Result<Option<(Flow, u16)>> {
        // An upcall is a `struct mrt6msg`: zero, type, interface, padding, source, destination. The
        // zero is in place of the type of an ICMPv6 header, which is never 0.
        let mut message = [0u8; 2048];
        loop {
            let length = match recv(self.socket.as_raw_fd(), &mut message, MsgFlags::MSG_TRUNC) {
                Ok(length) => length,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR | Errno::ENOBUFS) => continue,
                Err(errno) => return Err(errno).context("Failed to read an upcall"),
            };
            let [0, MRT6MSG_NOCACHE, mif0, mif1, ..] = message else {
                continue;
            };
            if length < 40 {
                continue;
            }
            if let (Some(source), Some(multicast_address)) =
                (address_at(&message, 8), address_at(&message, 24))
            {
                let incoming = u16::from_ne_bytes([mif0, mif1]);
                return Ok(Some((
                    Flow {
                        source,
                        multicast_address,
                    },
                    incoming,
                )));
            }
        }
    }

    fn set<T>(&self, option: c_int, value: &T) -> Result<()> {
        let size = libc::socklen_t::try_from(size_of::<T>()).context("Option value too large")?;
        // SAFETY: pointer and size describe a live value of the layout that the option takes.
        let result = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::IPPROTO_IPV6,
                option,
                std::ptr::from_ref(value).cast(),
                size,
            )
        };
        Errno::result(result)?;
        Ok(())
    }
}

fn address_at(message: &[u8], at: usize) -> Option<Ipv6Addr> {
    let bytes: [u8; 16] = message.get(at..at + 16)?.try_into().ok()?;
    Some(Ipv6Addr::from(bytes))
}

fn socket_address(address: Ipv6Addr) -> libc::sockaddr_in6 {
    libc::sockaddr_in6 {
        sin6_family: libc::AF_INET6 as libc::sa_family_t,
        sin6_port: 0,
        sin6_flowinfo: 0,
        sin6_addr: libc::in6_addr {
            s6_addr: address.octets(),
        },
        sin6_scope_id: 0,
    }
}
