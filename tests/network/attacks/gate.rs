//! A peer makes the agent close the gates of other VMs' TAPs.

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::time::Duration;

use common::signal::{AgentRequest, PeerMessage};
use support::agent::{Agent, domain, uuid};
use support::netns::{Namespace, privileged, wait_for};
use support::tap::Guest;

const GROUP: Ipv6Addr = Ipv6Addr::new(0xff1e, 0, 0, 0, 0, 0, 0x7000, 1);
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
const PORT: u16 = 5004;

/// A guest whose TAP has the MAC that libvirt would assign, its socket, and a sender.
struct Streamed {
    host: Namespace,
    guest: Guest,
    receiver: UdpSocket,
    sender: UdpSocket,
}

impl Streamed {
    fn new() -> Self {
        let host = Namespace::new("host");
        host.add_bridge("br0");
        let guest = Guest::start(&host, "br0", "tap0", 0);
        host.ip("link set tap0 address fe:54:00:00:00:07");
        let inner = guest.namespace.ifindex("eth0");
        let receiver = guest.namespace.run(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT)).unwrap();
            socket.join_multicast_v6(&GROUP, inner).unwrap();
            socket
        });
        receiver.set_nonblocking(true).unwrap();
        let bridge = host.ifindex("br0");
        let sender = host.run(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
            let group = SocketAddrV6::new(GROUP, PORT, 0, bridge);
            socket.connect(group).unwrap();
            socket
        });
        Self {
            host,
            guest,
            receiver,
            sender,
        }
    }

    /// Waits until the guest receives newly sent packets.
    fn wait_received(&self, what: &str) {
        self.drain();
        wait_for(what, || {
            self.sender.send(b"stream").unwrap();
            std::thread::sleep(Duration::from_millis(5));
            self.receiver.recv(&mut [0; 16]).is_ok().then_some(())
        });
    }

    fn drain(&self) {
        while self.receiver.recv(&mut [0; 16]).is_ok() {}
    }
}

/// Returns a request for a nonexistent domain with the MAC of another VM's NIC.
fn lie() -> AgentRequest {
    AgentRequest {
        domain_uuid: uuid(0xee).into(),
        domain_name: "nobody".to_owned(),
        macs: vec![MAC.into()],
        listeners: vec![],
        vm_transaction: None,
    }
}

#[test]
fn gate_that_a_peer_has_closed_by_a_mac_opens_again() {
    if !privileged() {
        return;
    }
    let streamed = Streamed::new();
    streamed.host.run_with_bpffs(|bpffs| {
        let agent = Agent::start(bpffs, &[], RULES);
        streamed.wait_received("the stream before the attack");
        let mut liar = agent.peer("vms2");
        liar.say(1, lie());
        assert!(matches!(liar.answer(1), PeerMessage::AgentResponse(_)));
        wait_for("the gate to close", || {
            streamed.sender.send(b"stream").unwrap();
            (agent.counter("held_frames") > 0).then_some(())
        });
        streamed.wait_received("the gate to open");
        for transaction in 2..10 {
            liar.say(transaction, lie());
        }
        liar.answer(9);
        streamed.wait_received("the stream while the peer goes on lying");
        assert!(
            agent.log().contains("handover.gate_max_s"),
            "{}",
            agent.log()
        );
    });
}

#[test]
fn tap_that_libvirt_has_given_to_a_domain_is_closed_for_no_other() {
    if !privileged() {
        return;
    }
    let streamed = Streamed::new();
    streamed.host.run_with_bpffs(|bpffs| {
        let victim = domain("victim", 1, "tap0", MAC);
        let agent = Agent::start(bpffs, &[victim], RULES);
        streamed.wait_received("the stream before the attack");
        let mut liar = agent.peer("vms2");
        for transaction in 1..10 {
            liar.say(transaction, lie());
        }
        // The agent has processed all earlier messages.
        liar.answer(9);
        streamed.wait_received("the stream");
        assert_eq!(agent.counter("held_frames"), 0);
    });
    drop(streamed.guest);
}

/// Configuration: gates open after one second.
const RULES: &str = "[handover]\ngate_max_s = 1\n\
    [[policy.arrive]]\nsources = [\"vms2\"]\ndomains = [\"*\"]\n";
