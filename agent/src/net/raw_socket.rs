//! Forwards complete IPv6 packets of other senders by the routes of this host (`raw(7)`,
//! `IPPROTO_RAW`).

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};

use socket2::{Domain, Protocol, Socket, Type};

use super::tap_socket::Sent;

/// A raw socket that sends only.
#[derive(Debug)]
pub struct RawSocket {
    socket: Socket,
}

impl RawSocket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// # Errors
    ///
    /// The error of the kernel; the call needs `CAP_NET_RAW`.
    pub fn open() -> io::Result<Self> {
        let protocol = Protocol::from(libc::IPPROTO_RAW);
        let kind = Type::RAW.cloexec().nonblocking();
        let socket = Socket::new(Domain::IPV6, kind, Some(protocol))?;
        Ok(Self { socket })
    }

    /// Sends a packet, given with its IPv6 header, to a destination.
    ///
    /// # Errors
    ///
    /// The error of the kernel, for instance that there is no route or that the packet exceeds the
    /// MTU of the next link.
    pub fn send(&self, packet: &[u8], to: Ipv6Addr) -> io::Result<Sent> {
        let to = SocketAddrV6::new(to, 0, 0, 0);
        match self.socket.send_to(packet, &to.into()) {
            Ok(_) => Ok(Sent::Queued),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOBUFS | libc::EAGAIN) => Ok(Sent::Full),
                _ => Err(error),
            },
        }
    }
}
