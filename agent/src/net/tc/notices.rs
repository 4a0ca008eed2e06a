//! Notices about changed qdiscs and filters (rtnetlink group `RTNLGRP_TC`).

use std::collections::BTreeSet;
use std::io;

use linux::netlink::bytes::messages;
use linux::netlink::{AsyncNotices, Group, Heard};

use super::message;

/// Receive buffer for notices, bytes; holds several thousand changes.
const RECEIVE_BUFFER_BYTES: u32 = 1024 * 1024;

/// A change of traffic control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Something changed on the interface with this index.
    Interface(u32),
    /// The kernel dropped notices: any interface may have changed.
    Lost,
}

/// Subscription to the changes of traffic control.
pub struct Notices {
    notices: AsyncNotices,
    /// Interfaces of the last datagram that [`Self::next`] has not returned yet.
    changed: BTreeSet<u32>,
}

impl Notices {
    /// Subscribes in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub fn watch() -> io::Result<Self> {
        let notices = AsyncNotices::open(&[Group::TrafficControl])?;
        notices.set_room(RECEIVE_BUFFER_BYTES)?;
        Ok(Self {
            notices,
            changed: BTreeSet::new(),
        })
    }

    /// Waits for the next change. Cancel safe.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub async fn next(&mut self) -> io::Result<Notice> {
        loop {
            if let Some(ifindex) = self.changed.pop_first() {
                return Ok(Notice::Interface(ifindex));
            }
            match self.notices.next().await? {
                Heard::Datagram(datagram) => {
                    let told = messages(&datagram);
                    self.changed
                        .extend(told.filter_map(|notice| message::ifindex(&notice)));
                }
                Heard::Lost => return Ok(Notice::Lost),
            }
        }
    }
}
