//! The UDP socket for nodes.

use std::io;
use std::net::SocketAddrV6;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// Size of the socket's buffers, which `net.core.rmem_max` and `wmem_max` may reduce: a burst of
/// several thousand datagrams.
const BUFFER_BYTES: usize = 8 * 1024 * 1024;

/// Creates the socket. Each received datagram carries its destination address (`IPV6_PKTINFO`).
pub(super) fn bind(address: SocketAddrV6) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(true)?;
    socket.set_recv_buffer_size(BUFFER_BYTES)?;
    socket.set_send_buffer_size(BUFFER_BYTES)?;
    setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
