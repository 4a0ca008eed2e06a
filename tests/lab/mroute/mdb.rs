//! Reads the multicast database (MDB) of a bridge by netlink.
//!
//! Messages are RTM_NEWMDB and RTM_DELMDB of `include/uapi/linux/if_bridge.h`: a `br_port_msg` (8
//! bytes) and nested attributes down to MDBA_MDB_ENTRY_INFO, which holds a `br_mdb_entry` (28
//! bytes) and more attributes. All integers are in host byte order.

use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use linux::netlink::bytes::{HEADER_BYTES, Message, RequestBytes, attributes, messages, values};
use linux::netlink::{Group, Heard, Netlink, Notices};
use nix::sys::socket::{setsockopt, sockopt};

const RTM_NEWMDB: u16 = 84;
const RTM_DELMDB: u16 = 85;
const RTM_GETMDB: u16 = 86;
const NLM_F_REQUEST_DUMP: u16 = 0x301;
/// Size of `struct br_port_msg`.
const PORT_MESSAGE_SIZE: usize = 8;

const MDBA_MDB: u16 = 1;
const MDBA_MDB_ENTRY: u16 = 1;
const MDBA_MDB_ENTRY_INFO: u16 = 1;
const MDBA_MDB_EATTR_GROUP_MODE: u16 = 3;
const MDBA_MDB_EATTR_SOURCE: u16 = 4;
const MDB_FLAGS_BLOCKED: u8 = 1 << 4;
const MCAST_INCLUDE: u8 = 1;
const ETH_P_IPV6: [u8; 2] = [0x86, 0xdd];
/// Size of `struct br_mdb_entry`.
const ENTRY_SIZE: usize = 28;

/// Room for a burst of a few thousand notifications.
const RECEIVE_BUFFER_BYTES: usize = 16 << 20;

/// One entry of the database that appeared, changed or vanished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    /// Ifindex of the port, in the bridge's namespace.
    pub port: u32,
    /// Multicast address of the entry.
    pub multicast_address: Ipv6Addr,
    /// Source of a (source, address) entry; `None` for an entry without a source.
    pub source: Option<Ipv6Addr>,
    /// True if the listener excludes the source.
    pub blocked: bool,
    /// True for an entry without a source whose listener is in INCLUDE mode: other entries name the
    /// wanted sources.
    pub include: bool,
    /// False if the entry was removed.
    pub present: bool,
}

/// Result of [`Watch::read`].
#[derive(Debug)]
pub enum Read {
    /// Changes, in order.
    Changes(Vec<Change>),
    /// The kernel dropped notifications, so the caller needs a new dump.
    Overrun,
}

/// A subscription to the changes of all bridges of one namespace.
#[derive(Debug)]
pub struct Watch(Notices);

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Watch {
    /// Subscribes in the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the socket.
    pub fn open() -> Result<Self> {
        let notices = Notices::open(&[Group::MulticastDatabase])
            .context("Failed to open a netlink socket")?;
        setsockopt(&notices, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)
            .context("Failed to enlarge the netlink receive buffer")?;
        Ok(Self(notices))
    }

    /// Reads all pending changes.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub fn read(&mut self) -> Result<Read> {
        let mut changes = Vec::new();
        loop {
            match self.0.try_next().context("Failed to read from netlink")? {
                Some(Heard::Datagram(datagram)) => parse(&datagram, &mut changes),
                Some(Heard::Lost) => return Ok(Read::Overrun),
                None => return Ok(Read::Changes(changes)),
            }
        }
    }
}

/// Reads the whole database of the bridges in the namespace of the calling thread.
///
/// # Errors
///
/// When the kernel refuses the request.
pub fn dump() -> Result<Vec<Change>> {
    let mut netlink = Netlink::open().context("Failed to open a netlink socket")?;
    let mut request = RequestBytes::new(RTM_GETMDB, NLM_F_REQUEST_DUMP);
    // `br_port_msg`: AF_BRIDGE, padding, and ifindex 0 for all bridges.
    request.push(&[7, 0, 0, 0, 0, 0, 0, 0]);
    let mut changes = Vec::new();
    netlink
        .dump_messages(request.finish(), |message| read(message, &mut changes))
        .context("Failed to read the MDB")?;
    Ok(changes)
}

/// Appends the changes in a datagram of netlink messages. Skips messages of other kinds.
fn parse(datagram: &[u8], changes: &mut Vec<Change>) {
    for message in messages(datagram) {
        read(&message, changes);
    }
}

/// Appends the changes in a message.
fn read(message: &Message<'_>, changes: &mut Vec<Change>) {
    if !matches!(message.kind, RTM_NEWMDB | RTM_DELMDB) {
        return;
    }
    let body = message.bytes.get(HEADER_BYTES + PORT_MESSAGE_SIZE..);
    let infos = values(body.unwrap_or_default(), MDBA_MDB)
        .flat_map(|tables| values(tables, MDBA_MDB_ENTRY))
        .flat_map(|entries| values(entries, MDBA_MDB_ENTRY_INFO));
    changes.extend(infos.filter_map(|info| entry(info, message.kind == RTM_NEWMDB)));
}

/// Parses MDBA_MDB_ENTRY_INFO; `None` for anything but routable IPv6.
fn entry(info: &[u8], present: bool) -> Option<Change> {
    let address: [u8; 16] = info.get(8..24)?.try_into().ok()?;
    if info.get(24..26)? != ETH_P_IPV6 {
        return None;
    }
    let multicast_address = Ipv6Addr::from(address);
    // Scopes 0 to 2 never leave their link (RFC 4291 section 2.7).
    if multicast_address.octets().get(1)? & 0x0f <= 2 {
        return None;
    }
    let mut change = Change {
        port: u32_at(info, 0)?,
        multicast_address,
        source: None,
        blocked: info.get(5)? & MDB_FLAGS_BLOCKED != 0,
        include: false,
        present,
    };
    for (kind, value) in attributes(info.get(ENTRY_SIZE..)?) {
        match kind {
            MDBA_MDB_EATTR_GROUP_MODE => {
                change.include = value.first() == Some(&MCAST_INCLUDE);
            }
            MDBA_MDB_EATTR_SOURCE => {
                let source: [u8; 16] = value.try_into().ok()?;
                change.source = Some(Ipv6Addr::from(source));
            }
            _ => {}
        }
    }
    Some(change)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let mut changes = Vec::new();
            parse(&bytes, &mut changes);
            let _ = entry(&bytes, true);
        }
    }
}
