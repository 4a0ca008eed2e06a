//! Notices of changes, which the kernel sends to those who have joined a group.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
#[cfg(feature = "tokio")]
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, TokioSocket};

/// What the notices are about (`RTNLGRP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Group {
    /// Interfaces.
    Link = 1,
    /// Neighbours and forwarding databases.
    Neighbour = 3,
    /// Qdiscs and filters.
    TrafficControl = 4,
    /// IPv6 addresses.
    Ipv6Address = 9,
    /// Multicast databases of bridges.
    MulticastDatabase = 26,
}

/// What was heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A datagram of messages; [`super::bytes::messages`] splits it.
    Datagram(Vec<u8>),
    /// The kernel had no room for notices: anything may have changed.
    Lost,
}

/// Hears notices, and never waits.
#[derive(Debug)]
pub struct Notices(Socket);

impl Notices {
    /// Joins groups, in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn open(groups: &[Group]) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_non_blocking(true)?;
        join(&mut socket, groups)?;
        Ok(Self(socket))
    }

    /// The next notices; `None` where none wait.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn try_next(&self) -> io::Result<Option<Heard>> {
        received(self.0.recv_from_full())
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Hears notices and has the runtime wait for them.
#[cfg(feature = "tokio")]
pub struct AsyncNotices(TokioSocket);

#[cfg(feature = "tokio")]
impl AsyncNotices {
    /// Joins groups, in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn open(groups: &[Group]) -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        join(socket.socket_mut(), groups)?;
        Ok(Self(socket))
    }

    /// Asks for room for so many bytes of notices that wait.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn set_room(&self, bytes: u32) -> io::Result<()> {
        self.0.socket_ref().set_rx_buf_sz(bytes)
    }

    /// Waits for notices. Can be cancelled without losing any.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub async fn next(&self) -> io::Result<Heard> {
        loop {
            if let Some(heard) = received(self.0.recv_from_full().await)? {
                return Ok(heard);
            }
        }
    }

    /// The next notices; `None` where none wait.
    ///
    /// # Errors
    ///
    /// What the socket says.
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
