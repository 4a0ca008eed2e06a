//! Changes of qdiscs and filters, as they happen (rtnetlink group `RTNLGRP_TC`).

use std::collections::BTreeSet;
use std::io;

use linux::netlink::bytes::messages;
use linux::netlink::{AsyncNotices, Group, Heard};

use super::message;

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
    notices: AsyncNotices,
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
        let notices = AsyncNotices::open(&[Group::TrafficControl])?;
        notices.set_room(RECEIVE_BUFFER_BYTES)?;
        Ok(Self {
            notices,
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
