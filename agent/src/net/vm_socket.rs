//! The socket on the bridge through which VMs and the agent exchange datagrams.
//!
//! UDP over IPv6 link-local, joined to ff02::1. The kernel program on a VM's TAP marks each
//! signalling datagram with the TAP's ifindex; the mark comes along as a control message and is the
//! only thing about a VM that it cannot forge. A datagram without mark did not come through a TAP.

use std::io::{self, IoSliceMut};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::AsRawFd;

use common::signal::{MAX_DATAGRAM_BYTES, PORT};
use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrIn6, recvmsg};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::UdpSocket;

use super::rcvmark;

/// All nodes on the link (RFC 4291 §2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Hop limit of what the agent sends: a VM can tell that it comes from its own link.
const HOP_LIMIT: u32 = 255;

/// Why the socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum VmSocketError {
    /// The bridge does not exist.
    #[error(
        "There is no bridge `{bridge}` here; create it or correct `bridge` in the configuration"
    )]
    NoBridge {
        /// Its name.
        bridge: String,
    },
    /// The kernel cannot tell the mark.
    #[error("The kernel does not know SO_RCVMARK ({error}); Linux 5.19 or newer is needed")]
    Mark {
        /// What it said.
        error: io::Error,
    },
    /// A socket call failed.
    #[error(
        "Cannot {action} on bridge `{bridge}`, UDP port {port}: {error}; run as root, and stop what else uses the port"
    )]
    Socket {
        /// What failed.
        action: &'static str,
        /// The bridge.
        bridge: String,
        /// The port.
        port: u16,
        /// What the kernel said.
        error: io::Error,
    },
}

/// One datagram from a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmDatagram {
    /// ifindex of the TAP it came through; `None` where no program marked it.
    pub mark: Option<u32>,
    /// The sender, link-local, with the bridge as scope.
    pub from: SocketAddrV6,
    /// Payload, at most [`MAX_DATAGRAM_BYTES`] bytes.
    pub bytes: Vec<u8>,
}

/// The socket.
#[derive(Debug)]
pub struct VmSocket {
    socket: UdpSocket,
    ifindex: u32,
}

impl VmSocket {
    /// Opens the socket on a bridge, on the signalling port. Must be called in a tokio runtime.
    ///
    /// # Errors
    ///
    /// See [`VmSocketError`].
    ///
    /// # Minimum kernel version
    ///
    /// 5.19
    pub fn open(bridge: &str) -> Result<Self, VmSocketError> {
        let ifindex =
            nix::net::if_::if_nametoindex(bridge).map_err(|_| VmSocketError::NoBridge {
                bridge: bridge.to_owned(),
            })?;
        let failed = |action| {
            move |error| VmSocketError::Socket {
                action,
                bridge: bridge.to_owned(),
                port: PORT,
                error,
            }
        };
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))
            .map_err(failed("open a socket"))?;
        socket
            .set_nonblocking(true)
            .and_then(|()| socket.set_only_v6(true))
            .and_then(|()| socket.set_reuse_address(true))
            .and_then(|()| socket.bind_device(Some(bridge.as_bytes())))
            .and_then(|()| socket.set_unicast_hops_v6(HOP_LIMIT))
            .and_then(|()| socket.set_multicast_hops_v6(HOP_LIMIT))
            .and_then(|()| socket.set_multicast_loop_v6(false))
            .map_err(failed("set socket options"))?;
        rcvmark::enable(&socket).map_err(|error| VmSocketError::Mark { error })?;
        socket
            .bind(&SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, PORT, 0, 0).into())
            .map_err(failed("bind"))?;
        socket
            .join_multicast_v6(&ALL_NODES, ifindex)
            .map_err(failed("join ff02::1"))?;
        let socket = UdpSocket::from_std(socket.into()).map_err(failed("watch the socket"))?;
        Ok(Self { socket, ifindex })
    }

    /// Receives the next datagram from a link-local sender. What comes from elsewhere, or is longer
    /// than a message can be, is skipped.
    ///
    /// # Errors
    ///
    /// The socket's own error, such as the bridge being gone.
    pub async fn recv(&self) -> io::Result<VmDatagram> {
        loop {
            let datagram = self
                .socket
                .async_io(Interest::READABLE, || recv_now(&self.socket))
                .await?;
            if let Some(datagram) = datagram {
                return Ok(datagram);
            }
        }
    }

    /// Sends a datagram out of the bridge.
    ///
    /// # Errors
    ///
    /// `InvalidInput` where the destination is not link-local; else what the kernel says.
    pub async fn send(&self, to: SocketAddrV6, bytes: &[u8]) -> io::Result<()> {
        if !to.ip().is_unicast_link_local() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is not a link-local address", to.ip()),
            ));
        }
        let to = SocketAddrV6::new(*to.ip(), to.port(), 0, self.ifindex);
        self.socket.send_to(bytes, to).await.map(drop)
    }
}

/// Receives one datagram; `None` where it is to be skipped.
fn recv_now(socket: &UdpSocket) -> io::Result<Option<VmDatagram>> {
    // One byte more than a message may have, so that a longer one is not taken for a whole one.
    let mut buffer = [0; MAX_DATAGRAM_BYTES + 1];
    let mut control = cmsg_space!(u32);
    let mut iov = [IoSliceMut::new(&mut buffer)];
    let (length, from, mark) = {
        let message = recvmsg::<SockaddrIn6>(
            socket.as_raw_fd(),
            &mut iov,
            Some(&mut control),
            MsgFlags::MSG_DONTWAIT,
        )?;
        let mark = message.cmsgs()?.find_map(|control| mark_of(&control));
        (message.bytes, message.address, mark)
    };
    let (Some(from), Some(bytes)) = (from, buffer.get(..length)) else {
        return Ok(None);
    };
    let from = SocketAddrV6::from(from);
    if length > MAX_DATAGRAM_BYTES || !from.ip().is_unicast_link_local() {
        tracing::debug!(%from, length, "Skipped a datagram that no VM of this link can have sent");
        return Ok(None);
    }
    Ok(Some(VmDatagram {
        // The kernel reports 0 for a packet that nothing has marked.
        mark: mark.filter(|&mark| mark != 0),
        from,
        bytes: bytes.to_vec(),
    }))
}

fn mark_of(control: &ControlMessageOwned) -> Option<u32> {
    let ControlMessageOwned::Unknown(control) = control else {
        return None;
    };
    if control.cmsg_header.cmsg_level != libc::SOL_SOCKET
        || control.cmsg_header.cmsg_type != libc::SO_MARK
    {
        return None;
    }
    let bytes = control.data_bytes.get(..4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(bytes))
}
