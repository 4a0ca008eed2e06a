//! The UDP sockets: one for each NIC, so that it is known which NIC an answer came in by.

use std::io;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use socket2::{Domain, Protocol, Socket, Type};

use common::signal::{MAX_DATAGRAM_BYTES, PORT};

use crate::client::Transmit;
use crate::interface::Interface;

/// Datagrams taken before others have their turn.
const MAX_BATCH: usize = 64;

/// The sockets, and the signals that stop the program.
pub(crate) struct Net {
    sockets: Vec<(u32, UdpSocket)>,
    signals: SignalFd,
}

/// What woke the program up.
pub(crate) enum Wake {
    /// Datagrams, or the time is over.
    Datagrams(Vec<Received>),
    /// SIGINT or SIGTERM.
    Interrupted,
}

/// A datagram from an agent's port.
pub(crate) struct Received {
    /// NIC that it came in by.
    pub(crate) ifindex: u32,
    /// Link-local address of its sender.
    pub(crate) from: Ipv6Addr,
    /// Payload.
    pub(crate) bytes: Vec<u8>,
}

impl Net {
    /// Opens a socket on each NIC and takes over SIGINT and SIGTERM.
    pub(crate) fn open(interfaces: &[Interface]) -> io::Result<Self> {
        let mut stop = SigSet::empty();
        stop.add(Signal::SIGINT);
        stop.add(Signal::SIGTERM);
        stop.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&stop, flags)?;
        let sockets = interfaces
            .iter()
            .map(|interface| Ok((interface.ifindex, socket(interface)?)))
            .collect::<io::Result<_>>()?;
        Ok(Self { sockets, signals })
    }

    /// Sends a datagram. An error of one NIC is no reason to stop: the next try may succeed.
    pub(crate) fn send(&self, transmit: &Transmit) -> io::Result<()> {
        let ifindex = transmit.ifindex;
        let (_, socket) = self
            .sockets
            .iter()
            .find(|(index, _)| *index == ifindex)
            .ok_or(io::ErrorKind::NotFound)?;
        let to = SocketAddrV6::new(transmit.to, PORT, 0, ifindex);
        socket.send_to(&transmit.bytes, to).map(drop)
    }

    /// Waits for datagrams, at most `patience`.
    pub(crate) fn wait(&self, patience: Duration) -> io::Result<Wake> {
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        for (_, socket) in &self.sockets {
            fds.push(PollFd::new(socket.as_fd(), PollFlags::POLLIN));
        }
        // Rounded up, or the last fraction of a millisecond would be a busy loop.
        let patience = patience + Duration::from_micros(999);
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, patience) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if self.signals.read_signal()?.is_some() {
            return Ok(Wake::Interrupted);
        }
        let mut datagrams = Vec::new();
        for (ifindex, socket) in &self.sockets {
            receive(*ifindex, socket, &mut datagrams);
        }
        Ok(Wake::Datagrams(datagrams))
    }
}

fn receive(ifindex: u32, socket: &UdpSocket, datagrams: &mut Vec<Received>) {
    // One byte more than allowed, so that a longer datagram is seen to be too long.
    let mut buffer = [0; MAX_DATAGRAM_BYTES + 1];
    for _ in 0..MAX_BATCH {
        let (length, from) = match socket.recv_from(&mut buffer) {
            Ok((length, SocketAddr::V6(from))) => (length, from),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            // An ICMPv6 error about something sent before; the retry takes care of it.
            Ok(_) | Err(_) => continue,
        };
        if from.port() != PORT || !from.ip().is_unicast_link_local() {
            continue;
        }
        if let Some(bytes) = buffer.get(..length) {
            datagrams.push(Received {
                ifindex,
                from: *from.ip(),
                bytes: bytes.to_vec(),
            });
        }
    }
}

/// A socket on a port that is not the agents': what a VM sends from that one ends at its TAP.
fn socket(interface: &Interface) -> io::Result<UdpSocket> {
    let socket = bound(interface)?;
    if socket.local_addr()?.port() == PORT {
        // While the first is there, the kernel has another one for the second.
        return bound(interface);
    }
    Ok(socket)
}

fn bound(interface: &Interface) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_only_v6(true)?;
    socket.set_nonblocking(true)?;
    socket.bind_device(Some(interface.name.as_bytes()))?;
    socket.set_multicast_if_v6(interface.ifindex)?;
    socket.set_multicast_hops_v6(255)?;
    socket.set_unicast_hops_v6(255)?;
    socket.set_multicast_loop_v6(false)?;
    socket.bind(&SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0).into())?;
    Ok(socket.into())
}
