//! UDP sockets of the node: one per MoA, because the socket determines NIC and source address of a
//! datagram.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use common::mat::NODE_PORT;
use common::signal::MAX_DATAGRAM_BYTES;
use nix::net::if_::if_indextoname;
use socket2::{Domain, Protocol, Socket, Type};

use super::core::{Place, Received};

/// Limit of datagrams per socket and call, so that other inputs have their turn.
const MAX_BATCH: usize = 64;

/// The open sockets, by MoA.
#[derive(Default)]
pub(super) struct Sockets {
    open: BTreeMap<Ipv6Addr, (u32, UdpSocket)>,
}

impl Sockets {
    /// Opens a socket for each place and closes all others. A later send retries a socket that
    /// cannot be opened now.
    pub(super) fn set(&mut self, places: &[Place]) {
        self.open.retain(|moa, (ifindex, _)| {
            places.contains(&Place {
                ifindex: *ifindex,
                moa: *moa,
            })
        });
        for place in places {
            if !self.open.contains_key(&place.moa)
                && let Ok(socket) = socket(*place)
            {
                self.open.insert(place.moa, (place.ifindex, socket));
            }
        }
    }

    /// Sends a datagram. The core repeats messages, so an error needs no handling.
    pub(super) fn send(&self, from: Ipv6Addr, to: SocketAddrV6, bytes: &[u8]) -> io::Result<()> {
        let (_, socket) = self.open.get(&from).ok_or(io::ErrorKind::NotFound)?;
        socket.send_to(bytes, to).map(drop)
    }

    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.open.values().map(|(_, socket)| socket.as_fd())
    }

    /// Reads all pending datagrams.
    pub(super) fn receive(&self) -> Vec<Received> {
        let mut received = Vec::new();
        // One byte more than the limit, so that the core recognizes a datagram that is too long.
        let mut buffer = [0; MAX_DATAGRAM_BYTES + 1];
        for (local, (_, socket)) in &self.open {
            for _ in 0..MAX_BATCH {
                match socket.recv_from(&mut buffer) {
                    Ok((length, SocketAddr::V6(from))) => received.push(Received {
                        local: *local,
                        from,
                        bytes: buffer.get(..length).unwrap_or_default().to_vec(),
                    }),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // An ICMPv6 error about an earlier datagram; the repetition handles the loss.
                    Ok(_) | Err(_) => {}
                }
            }
        }
        received
    }
}

fn socket(place: Place) -> io::Result<UdpSocket> {
    let name = if_indextoname(place.ifindex)?;
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(true)?;
    socket.set_nonblocking(true)?;
    // After a restart the address may still be tentative.
    socket.set_freebind_v6(true)?;
    socket.bind_device(Some(name.as_bytes()))?;
    socket.bind(&SocketAddrV6::new(place.moa, NODE_PORT, 0, 0).into())?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{in_namespace, ip};
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    #[test]
    fn datagram_goes_from_the_address_that_is_named() {
        in_namespace(|| {
            ip("link set lo up");
            ip("link add nic0 type veth peer name nic1");
            ip("link set nic0 up");
            ip("link set nic1 up");
            ip("address add 2001:db8::5/64 dev nic0 nodad");
            ip("address add 2001:db8::6/64 dev nic0 nodad");
            let ifindex = nix::net::if_::if_nametoindex("nic0").unwrap();
            let place = |last: u16| Place {
                ifindex,
                moa: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last),
            };
            let mut sockets = Sockets::default();
            sockets.set(&[place(5), place(6)]);
            // Packets to an own address use the loopback, which is another device.
            let to = SocketAddrV6::new(place(6).moa, NODE_PORT, 0, 0);
            sockets.send(place(5).moa, to, b"hello").unwrap();
            let mut fds: Vec<_> = sockets
                .fds()
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            let ready = poll(&mut fds, PollTimeout::from(200_u16)).unwrap();
            for received in sockets.receive() {
                assert_eq!(ready, 1);
                assert_eq!(
                    (received.local, *received.from.ip()),
                    (place(6).moa, place(5).moa)
                );
            }
            sockets.set(&[place(6)]);
            assert!(sockets.send(place(5).moa, to, b"hello").is_err());
            assert_eq!(sockets.fds().count(), 1);
        });
    }
}
