//! Changes of qdiscs and filters, as they happen (rtnetlink group `RTNLGRP_TC`).

use std::collections::BTreeSet;
use std::io;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket};

use super::super::netlink;
use super::message;

/// `RTNLGRP_TC`.
const TC_GROUP: u32 = 4;
/// Receive buffer for notices, bytes: several thousand changes at once.
const RECEIVE_BUFFER_BYTES: u32 = 1024 * 1024;

/// A change of traffic control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Of this interface.
    Interface(u32),
    /// Of any interface: notices were lost.
    Lost,
}

/// Watches traffic control.
pub struct Notices {
    socket: TokioSocket,
    /// Interfaces of the last datagram that have not been told.
    changed: BTreeSet<u32>,
}

impl Notices {
    /// Starts to watch, in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn watch() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_ref().add_membership(TC_GROUP)?;
        socket.socket_ref().set_rx_buf_sz(RECEIVE_BUFFER_BYTES)?;
        Ok(Self {
            socket,
            changed: BTreeSet::new(),
        })
    }

    /// Waits for the next change. Can be cancelled without losing one.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub async fn next(&mut self) -> io::Result<Notice> {
        loop {
            if let Some(ifindex) = self.changed.pop_first() {
                return Ok(Notice::Interface(ifindex));
            }
            match self.socket.recv_from_full().await {
                Ok((datagram, _)) => {
                    let told = netlink::messages(&datagram);
                    self.changed
                        .extend(told.filter_map(|notice| message::ifindex(&notice)));
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    return Ok(Notice::Lost);
                }
                Err(error) => return Err(error),
            }
        }
    }
}
