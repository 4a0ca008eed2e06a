//! Notices of changes, which the kernel sends to the members of multicast groups of rtnetlink.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
#[cfg(feature = "tokio")]
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket};

/// Multicast group of rtnetlink (`RTNLGRP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Group {
    /// Interfaces (`RTNLGRP_LINK`).
    Link = 1,
    /// Neighbours and forwarding databases (`RTNLGRP_NEIGH`).
    Neighbour = 3,
    /// Qdiscs and filters (`RTNLGRP_TC`).
    TrafficControl = 4,
    /// IPv6 addresses (`RTNLGRP_IPV6_IFADDR`).
    Ipv6Address = 9,
    /// Multicast databases of bridges (`RTNLGRP_MDB`).
    MulticastDatabase = 26,
}

/// Result of one receive call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A datagram of one or more messages; [`super::bytes::messages`] splits it.
    Datagram(Vec<u8>),
    /// The kernel dropped notices (`ENOBUFS`): anything may have changed.
    Lost,
}

/// Receives notices without blocking.
#[derive(Debug)]
pub struct Notices(Socket);

impl Notices {
    /// Joins groups in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub fn open(groups: &[Group]) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_non_blocking(true)?;
        join(&mut socket, groups)?;
        Ok(Self(socket))
    }

    /// Returns the next notices; `None` if none wait.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub fn try_next(&self) -> io::Result<Option<Heard>> {
        received(self.0.recv_from_full())
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Receives notices in a tokio runtime.
#[cfg(feature = "tokio")]
pub struct AsyncNotices(TokioSocket);

#[cfg(feature = "tokio")]
impl AsyncNotices {
    /// Joins groups in the network namespace of the calling thread. Must be called in a tokio
    /// runtime.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub fn open(groups: &[Group]) -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        join(socket.socket_mut(), groups)?;
        Ok(Self(socket))
    }

    /// Sets the size of the receive buffer in bytes (`SO_RCVBUF`).
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub fn set_room(&self, bytes: u32) -> io::Result<()> {
        self.0.socket_ref().set_rx_buf_sz(bytes)
    }

    /// Waits for notices. Cancel safe.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub async fn next(&self) -> io::Result<Heard> {
        loop {
            if let Some(heard) = received(self.0.recv_from_full().await)? {
                return Ok(heard);
            }
        }
    }

    /// Returns the next notices; `None` if none wait.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub fn try_next(&self) -> io::Result<Option<Heard>> {
        received(self.0.socket_ref().recv_from_full())
    }
}

fn join(socket: &mut Socket, groups: &[Group]) -> io::Result<()> {
    socket.bind_auto()?;
    for group in groups {
        socket.add_membership(*group as u32)?;
    }
    Ok(())
}

fn received<A>(received: io::Result<(Vec<u8>, A)>) -> io::Result<Option<Heard>> {
    match received {
        Ok((datagram, _)) => Ok(Some(Heard::Datagram(datagram))),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(Some(Heard::Lost)),
        Err(error) => Err(error),
    }
}
