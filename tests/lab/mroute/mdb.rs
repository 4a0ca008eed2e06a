//! Reading the multicast database of a bridge by netlink.
//!
//! Messages are RTM_NEWMDB and RTM_DELMDB of `include/uapi/linux/if_bridge.h`: a `br_port_msg`
//! (8 bytes) and nested attributes down to MDBA_MDB_ENTRY_INFO, which holds a `br_mdb_entry`
//! (28 bytes) and more attributes. All integers are in host byte order.

use std::net::Ipv6Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt,
};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const RTM_NEWMDB: u16 = 84;
const RTM_DELMDB: u16 = 85;
const RTM_GETMDB: u16 = 86;
/// Multicast group 26 (RTNLGRP_MDB) as a bit of the bind address.
const MDB_GROUP: u32 = 1 << 25;
const NLM_F_REQUEST_DUMP: u16 = 0x301;

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
    /// The multicast address.
    pub multicast_address: Ipv6Addr,
    /// Source of a (source, address) entry.
    pub source: Option<Ipv6Addr>,
    /// The source is one that the listener does not want.
    pub blocked: bool,
    /// An entry without a source whose listener is in INCLUDE mode: it wants only the sources
    /// that entries of their own name.
    pub include: bool,
    /// False if the entry is gone.
    pub present: bool,
}

/// What [`Watch::read`] found.
#[derive(Debug)]
pub enum Read {
    /// Changes in their order.
    Changes(Vec<Change>),
    /// The kernel dropped notifications: a new dump is needed.
    Overrun,
}

/// A subscription to the changes of all bridges of one namespace.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
    buffer: Vec<u8>,
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Watch {
    /// Subscribes in the namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the socket.
    pub fn open() -> Result<Self> {
        let watch = netlink_socket(MDB_GROUP, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        setsockopt(&watch, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)
            .context("Failed to enlarge the netlink receive buffer")?;
        Ok(Self {
            socket: watch,
            buffer: vec![0; 1 << 16],
        })
    }

    /// Reads all changes that wait.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub fn read(&mut self) -> Result<Read> {
        let mut changes = Vec::new();
        loop {
            match recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(length) => {
                    parse(self.buffer.get(..length).unwrap_or_default(), &mut changes);
                }
                Err(Errno::EAGAIN) => return Ok(Read::Changes(changes)),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOBUFS) => return Ok(Read::Overrun),
                Err(errno) => return Err(errno).context("Failed to read from netlink"),
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
    let socket = netlink_socket(0, SockFlag::SOCK_CLOEXEC)?;
    // nlmsghdr (length, type, flags, sequence, port) and an empty br_port_msg.
    let mut request = Vec::with_capacity(24);
    request.extend_from_slice(&24u32.to_ne_bytes());
    request.extend_from_slice(&RTM_GETMDB.to_ne_bytes());
    request.extend_from_slice(&NLM_F_REQUEST_DUMP.to_ne_bytes());
    request.extend_from_slice(&1u32.to_ne_bytes());
    request.extend_from_slice(&[0; 4]);
    // AF_BRIDGE, padding, any ifindex.
    request.extend_from_slice(&[7, 0, 0, 0, 0, 0, 0, 0]);
    send(socket.as_raw_fd(), &request, MsgFlags::empty()).context("Failed to ask for the MDB")?;
    let mut buffer = vec![0; 1 << 16];
    let mut changes = Vec::new();
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())
            .context("Failed to read the MDB")?;
        match parse(buffer.get(..length).unwrap_or_default(), &mut changes) {
            End::Open if length > 0 => {}
            End::Failed => bail!("The kernel refused to dump its multicast database"),
            _ => return Ok(changes),
        }
    }
}

fn netlink_socket(groups: u32, flags: SockFlag) -> Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        flags,
        SockProtocol::NetlinkRoute,
    )
    .context("Failed to open a netlink socket")?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))
        .context("Failed to bind a netlink socket")?;
    Ok(socket)
}

/// How a datagram of netlink messages ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// More may follow.
    Open,
    Done,
    Failed,
}

/// Appends the changes in a datagram of netlink messages. What is not understood is skipped.
fn parse(mut datagram: &[u8], changes: &mut Vec<Change>) -> End {
    while let Some(length) = u32_at(datagram, 0).and_then(|length| usize::try_from(length).ok()) {
        let (Some(kind), Some(body)) = (u16_at(datagram, 4), datagram.get(16..length)) else {
            break;
        };
        match kind {
            NLMSG_DONE => return End::Done,
            NLMSG_ERROR => return End::Failed,
            RTM_NEWMDB | RTM_DELMDB => {
                for (_, tables) in attributes(body.get(8..).unwrap_or_default())
                    .filter(|(kind, _)| *kind == MDBA_MDB)
                {
                    for (_, entries) in
                        attributes(tables).filter(|(kind, _)| *kind == MDBA_MDB_ENTRY)
                    {
                        for (_, info) in
                            attributes(entries).filter(|(kind, _)| *kind == MDBA_MDB_ENTRY_INFO)
                        {
                            changes.extend(entry(info, kind == RTM_NEWMDB));
                        }
                    }
                }
            }
            _ => {}
        }
        datagram = datagram
            .get(length.next_multiple_of(4)..)
            .unwrap_or_default();
    }
    End::Open
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

/// Walks netlink attributes: (type without flags, value).
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & 0x3fff;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
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
