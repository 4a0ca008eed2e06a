//! Probe of DstAgent on the idle NIC, to detect the arrival of the VM: DstAgent answers only on its
//! own link.
//!
//! The paper uses a ping. A ping needs DstAgent's Ethernet address; before the migration the kernel
//! cannot resolve the address and retries only once a second, so a ping would detect the arrival up
//! to a second late. The probe therefore is the Neighbor Solicitation itself (RFC 4861 §4.3), and
//! an Advertisement is the answer. Any node on the link could forge the answer, which is only a
//! hint.

use std::io::{self, Read};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::interface::Interface;
use socket2::{Domain, Protocol, Socket, Type};

/// Interval between probes: during the memory copy, and near the switch.
const DISTANCE: Duration = Duration::from_millis(500);
const DISTANCE_NEAR: Duration = Duration::from_millis(20);
/// Limit of datagrams per call, so that other inputs have their turn.
const MAX_BATCH: usize = 64;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
/// Position of the target address in both messages, bytes.
const TARGET: std::ops::Range<usize> = 8..24;

/// A raw ICMPv6 socket with the state of the probe.
pub(super) struct Probe {
    socket: Socket,
    agent: Ipv6Addr,
    to: SocketAddrV6,
    message: Vec<u8>,
    pub(super) next: Duration,
    /// Whether the switch is near.
    pub(super) near: bool,
}

impl Probe {
    pub(super) fn open(
        now: Duration,
        nic: &Interface,
        moa: Ipv6Addr,
        agent: Ipv6Addr,
    ) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        socket.set_nonblocking(true)?;
        socket.bind_device(Some(nic.name.as_bytes()))?;
        socket.set_multicast_if_v6(nic.ifindex)?;
        // RFC 4861 §7.1.1: a receiver discards a message that a router has forwarded.
        socket.set_multicast_hops_v6(255)?;
        socket.set_multicast_loop_v6(false)?;
        socket.set_freebind_v6(true)?;
        socket.bind(&SocketAddrV6::new(moa, 0, 0, 0).into())?;
        let [.., a, b, c] = agent.octets();
        let group = u128::from_be_bytes([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c]);
        Ok(Self {
            socket,
            agent,
            to: SocketAddrV6::new(Ipv6Addr::from_bits(group), 0, 0, nic.ifindex),
            message: solicitation(agent, nic.mac),
            next: now,
            near: false,
        })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Sends a probe when due.
    pub(super) fn handle_timeout(&mut self, now: Duration) {
        if now >= self.next {
            let distance = if self.near { DISTANCE_NEAR } else { DISTANCE };
            self.next = now + distance;
            // The next probe repeats a failed one.
            let _ = self.socket.send_to(&self.message, &self.to.into());
        }
    }

    /// Whether DstAgent has answered a probe.
    pub(super) fn is_answered(&mut self) -> bool {
        let mut answered = false;
        let mut buffer = [0; 128];
        for _ in 0..MAX_BATCH {
            match self.socket.read(&mut buffer) {
                Ok(length) => {
                    answered |= answers(buffer.get(..length).unwrap_or_default(), self.agent);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {}
            }
        }
        answered
    }
}

fn solicitation(target: Ipv6Addr, mac: [u8; 6]) -> Vec<u8> {
    // The kernel computes the checksum on ICMPv6 sockets (RFC 3542 §3.1).
    let mut message = vec![SOLICITATION, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    // Source Link-Layer Address option, 8 bytes.
    message.extend([1, 1]);
    message.extend(mac);
    message
}

/// Whether a message is DstAgent's Advertisement. A raw ICMPv6 socket returns messages without the
/// IPv6 header.
fn answers(message: &[u8], agent: Ipv6Addr) -> bool {
    message.first() == Some(&ADVERTISEMENT) && message.get(TARGET) == Some(&agent.octets()[..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interface;
    use crate::testing::{Neighbour, in_namespace, ip, without_dad};
    use linux::netlink::Netlink;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use proptest::prelude::*;

    const AGENT: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x10);

    #[test]
    fn agent_answers_on_its_own_link_only() {
        in_namespace(|| {
            let neighbour = Neighbour::start(|| {
                ip("link set agent0 up");
                ip("address add 2001:db8:2::10/64 dev agent0 nodad");
            });
            without_dad();
            for name in ["nic0", "nic1"] {
                let other = name.replace("nic", "agent");
                ip(&format!("link add {name} type veth peer name {other}"));
                ip(&format!("link set {other} netns {}", neighbour.tid));
                ip(&format!("link set {name} up"));
            }
            neighbour.run();
            neighbour.result();
            let interfaces = interface::list(&mut Netlink::open().unwrap()).unwrap();
            let answered = |name: &str, patience: u16| {
                let moa: Ipv6Addr = "2001:db8:2::99".parse().unwrap();
                ip(&format!(
                    "address add {moa}/64 dev {name} nodad noprefixroute"
                ));
                let nic = interfaces.iter().find(|it| it.name == name).unwrap();
                let mut probe = Probe::open(Duration::ZERO, nic, moa, AGENT).unwrap();
                let mut turns = 0;
                let answered = loop {
                    probe.handle_timeout(probe.next);
                    let mut fds = [PollFd::new(probe.fd(), PollFlags::POLLIN)];
                    poll(&mut fds, PollTimeout::from(patience)).unwrap();
                    turns += 1;
                    if probe.is_answered() || turns == 50 {
                        break turns < 50;
                    }
                };
                ip(&format!("address del {moa}/64 dev {name}"));
                answered
            };
            assert!(answered("nic0", 100));
            assert!(!answered("nic1", 2));
        });
    }

    proptest! {
        #[test]
        fn any_message_is_read(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            prop_assert!(!answers(&bytes, AGENT));
        }
    }
}
