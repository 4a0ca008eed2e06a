//! The socket for nodes.

use std::io;
use std::net::SocketAddrV6;

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// What the kernel may hold for us, as far as `net.core.rmem_max` and `wmem_max` let it: a burst of
/// several thousand datagrams.
const BUFFER_BYTES: usize = 8 * 1024 * 1024;

/// Makes the socket. Each datagram will say which address it was sent to.
pub(super) fn bind(address: SocketAddrV6) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(true)?;
    socket.set_recv_buffer_size(BUFFER_BYTES)?;
    socket.set_send_buffer_size(BUFFER_BYTES)?;
    setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}
