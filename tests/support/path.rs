//! A relay and an agent's host on either side of a router, with a sender and guests.
//!
//! ```text
//!  sender --s0  r0-- relay --r1  t0-- transit --t1  up0-- host --br0-- vnet0  guest
//!   multicast          replicate        IPv6      uplink,    |'------ vnet1  bystander
//!                                       router    leak       '------- up1    neighbour
//! ```

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::time::Duration;

use common::maps::Origins;
use roamcast::clock::now;
use roamcast::datapath::{Datapath, UplinkHook};
use socket2::{Domain, Protocol, Socket, Type};

use super::netns::{Namespace, command, wait_for};
use super::relay::Relayed;
use super::tap::Guest;

/// UDP ports of the stream.
pub const PORTS: (u16, u16) = (5000, 5004);
/// Address of the sender.
pub const SENDER: &str = "2001:db8:5::1";
/// Address of the relay towards agents.
pub const RELAY: &str = "2001:db8:7::1";
/// Address of the agent's host.
pub const AGENT: &str = "2001:db8:9::1";
/// Source-specific address, so that the guest listens to the true source only.
pub const GROUP: &str = "ff3e::1234";
/// Packets with this number or a higher one are larger than a page.
pub const JUMBO: u32 = 1 << 20;
/// MTU that these packets need.
const JUMBO_MTU: u32 = 9000;
/// Longer than the transit time of any packet.
const QUIET: Duration = Duration::from_millis(300);
/// Socket buffer for all packets of a test, bytes.
const RECEIVE_BUFFER: usize = 8 << 20;

/// The namespaces, in the order of the path, and both guests.
pub struct Path {
    /// Where the multicast stream starts.
    pub sender: Namespace,
    /// Host of the relay.
    pub relay: Namespace,
    /// Router between relay and agent.
    pub transit: Namespace,
    /// Host of the agent and the guests.
    pub host: Namespace,
    /// Host on another port of the agent's bridge.
    pub neighbour: Namespace,
    /// Guest that listens.
    pub guest: Guest,
    /// Guest that does not listen.
    pub bystander: Guest,
}

impl Path {
    /// Makes the namespaces, and waits until the network works.
    pub fn new() -> Self {
        let [sender, relay, transit, host, neighbour] =
            ["sender", "relay", "transit", "host", "neighbour"].map(Namespace::new);
        pair(&sender, "s0", &relay, "r0");
        pair(&relay, "r1", &transit, "t0");
        pair(&transit, "t1", &host, "up0");
        pair(&host, "up1", &neighbour, "n0");
        for (namespace, interface, address) in [
            (&sender, "s0", SENDER),
            (&relay, "r0", "2001:db8:5::ff"),
            (&relay, "r1", RELAY),
            (&transit, "t0", "2001:db8:7::ff"),
            (&transit, "t1", "2001:db8:9::ff"),
        ] {
            namespace.ip(&format!("addr add {address}/64 dev {interface} nodad"));
        }
        transit.run(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap());
        relay.ip("-6 route add default via 2001:db8:7::ff");
        // Without a querier the bridge floods. The bridge counts as its own querier after the Max
        // Response Time, which must be set before.
        host.ip(
            "link add br0 type bridge mcast_snooping 1 mcast_mld_version 2 \
             mcast_query_response_interval 10 mcast_startup_query_interval 10 \
             mcast_startup_query_count 100",
        );
        host.ip("link set br0 type bridge mcast_querier 1");
        host.ip("link set br0 up");
        host.ip(&format!("addr add {AGENT}/64 dev br0 nodad"));
        host.ip("-6 route add default via 2001:db8:9::ff");
        host.ip("link set up0 master br0");
        // The bridge takes the neighbour for a multicast router and would send all multicast to it.
        host.ip("link set up1 master br0");
        host.bridge("link set dev up1 mcast_router 2");
        let guest = Guest::start(&host, "br0", "vnet0", 0);
        let bystander = Guest::start(&host, "br0", "vnet1", 0);
        let path = Self {
            sender,
            relay,
            transit,
            host,
            neighbour,
            guest,
            bystander,
        };
        path.resolve();
        wait_for("querier that the bridge believes in", || {
            let queries = snmp6(&path.bystander.namespace, "Icmp6InGroupMembQueries");
            (queries >= 3).then_some(())
        });
        path
    }

    /// Waits until the relay knows the link address of the next hop to the agent, which the relay's
    /// signalling would have resolved.
    fn resolve(&self) {
        let socket = self.relay.run(|| UdpSocket::bind("[::]:0").unwrap());
        wait_for("route from relay to agent", || {
            let _ = socket.send_to(b"?", (AGENT, 9));
            let arguments = ["-n", self.relay.name(), "-6", "neigh", "show", "dev", "r1"];
            let neighbours = command("ip", &arguments);
            neighbours
                .lines()
                .any(|line| line.contains("2001:db8:7::ff") && line.contains("lladdr"))
                .then_some(())
        });
    }

    /// Switches the checksum offload of a veth's sending end. With offload, packets travel with a
    /// partial checksum.
    pub fn offload(namespace: &Namespace, interface: &str, on: bool) {
        let state = if on { "on" } else { "off" };
        namespace.run(|| command("ethtool", &["-K", interface, "tx", state]));
    }

    /// Raises the MTU of every link for packets from [`JUMBO`] on.
    pub fn raise_mtu(&self) {
        for (namespace, interface) in [
            (&self.sender, "s0"),
            (&self.relay, "r0"),
            (&self.relay, "r1"),
            (&self.transit, "t0"),
            (&self.transit, "t1"),
            (&self.host, "up0"),
            (&self.host, "up1"),
            (&self.neighbour, "n0"),
            (&self.host, "vnet0"),
            (&self.host, "vnet1"),
            (&self.guest.namespace, "eth0"),
            (&self.bystander.namespace, "eth0"),
        ] {
            namespace.ip(&format!("link set {interface} mtu {JUMBO_MTU}"));
        }
    }

    /// Attaches an agent's programs to the host, with the relayed flow.
    pub fn agent(
        &self,
        bpffs: &std::path::Path,
        hook: Option<UplinkHook>,
        relayed: &Relayed,
    ) -> Datapath {
        let mut config = super::host::config(bpffs);
        config.uplink_hook = hook;
        let datapath = Datapath::load(&config).unwrap();
        for uplink in ["up0", "up1"] {
            let ifindex = self.host.ifindex(uplink);
            datapath.attach_uplink(ifindex, uplink).unwrap();
        }
        datapath
            .relay_flow_set(&relayed.flow_key(), &relayed.flow())
            .unwrap();
        let managed = relayed.stream.managed();
        datapath.manage(&managed, now(), Origins::Relay).unwrap();
        datapath
    }

    /// Attaches a relay's program that watches the flow, without a subscriber.
    pub fn relay(&self, bpffs: &std::path::Path, relayed: &Relayed) -> Datapath {
        let datapath = Datapath::load(&super::host::config(bpffs)).unwrap();
        let ifindex = self.relay.ifindex("r0");
        datapath.attach_replicate(ifindex, "r0").unwrap();
        let managed = relayed.stream.managed();
        datapath.manage(&managed, now(), Origins::Native).unwrap();
        datapath
    }

    /// Returns the sender's flow, relayed to an address of the host.
    pub fn relayed(agent: &str) -> Relayed {
        let address = |text: &str| text.parse().unwrap();
        Relayed::new(
            (address(SENDER), PORTS.0),
            (address(GROUP), PORTS.1),
            address(RELAY),
            address(agent),
        )
    }

    /// Joins in the guest, and waits until the bridge knows the listener.
    pub fn listen(&self) -> Receiver {
        let receiver = Receiver::join(&self.guest.namespace, "eth0");
        wait_for("bridge's entry of the listener", || {
            let entries = self.host.bridge("mdb show dev br0");
            entries.contains(GROUP).then_some(())
        });
        receiver
    }

    /// Sends packets, numbered from `first` on, each with its [`payload`].
    pub fn send(&self, first: u32, count: u32) {
        self.sender.run(|| {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).unwrap();
            let ifindex = nix::net::if_::if_nametoindex("s0").unwrap();
            socket.set_multicast_if_v6(ifindex).unwrap();
            socket.set_multicast_hops_v6(8).unwrap();
            let own = SocketAddrV6::new(SENDER.parse().unwrap(), PORTS.0, 0, 0);
            socket.set_reuse_address(true).unwrap();
            socket.bind(&own.into()).unwrap();
            let group = SocketAddrV6::new(GROUP.parse().unwrap(), PORTS.1, 0, ifindex);
            for number in first..first + count {
                socket.send_to(&payload(number), &group.into()).unwrap();
            }
        });
    }
}

/// Returns the payload of a packet: alternately 1400 and 100 bytes, 8900 from [`JUMBO`] on.
pub fn payload(number: u32) -> Vec<u8> {
    let length = match number {
        JUMBO.. => 8900,
        _ if number.is_multiple_of(2) => 1400,
        _ => 100,
    };
    let mut payload = number.to_be_bytes().to_vec();
    payload.extend((4..length).map(|index| (index as u32 ^ number) as u8));
    payload
}

/// A socket that listens to the stream, with its received packets.
pub struct Receiver {
    socket: UdpSocket,
    received: Vec<u32>,
}

impl Receiver {
    /// Joins in a namespace, with the true source only.
    pub fn join(namespace: &Namespace, interface: &str) -> Self {
        let socket = namespace.run(|| {
            let socket = bind((Ipv6Addr::UNSPECIFIED, PORTS.1));
            let (group, source) = (GROUP.parse().unwrap(), SENDER.parse().unwrap());
            lab::listener::join_source(&socket, interface, group, source).unwrap();
            socket
        });
        Self::new(socket)
    }

    /// Receives datagrams to an address of a namespace.
    pub fn bind(namespace: &Namespace, address: (&str, u16)) -> Self {
        let (text, port) = address;
        let socket = namespace.run(|| bind((text.parse().unwrap(), port)));
        Self::new(socket)
    }

    fn new(socket: Socket) -> Self {
        socket.set_read_timeout(Some(QUIET)).unwrap();
        Self {
            socket: socket.into(),
            received: Vec::new(),
        }
    }

    /// Receives until no packet arrives for a while; checks contents and source.
    pub fn drain(&mut self, source: (&str, u16)) {
        let source = SocketAddrV6::new(source.0.parse().unwrap(), source.1, 0, 0);
        let mut buffer = [0; 9000];
        while let Ok((length, from)) = self.socket.recv_from(&mut buffer) {
            assert_eq!(from, source.into());
            let number = u32::from_be_bytes(buffer[..4].try_into().unwrap());
            assert_eq!(buffer[..length], payload(number)[..]);
            self.received.push(number);
        }
    }

    /// Waits until a number of packets have arrived.
    pub fn expect(&mut self, count: usize, source: (&str, u16)) {
        wait_for("packets of the stream", || {
            self.drain(source);
            (self.received.len() >= count).then_some(())
        });
    }

    /// Returns the received numbers, sorted.
    pub fn numbers(mut self) -> Vec<u32> {
        self.received.sort_unstable();
        self.received
    }
}

fn bind((address, port): (Ipv6Addr, u16)) -> Socket {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).unwrap();
    nix::sys::socket::setsockopt(
        &socket,
        nix::sys::socket::sockopt::RcvBufForce,
        &RECEIVE_BUFFER,
    )
    .unwrap();
    socket
        .bind(&SocketAddrV6::new(address, port, 0, 0).into())
        .unwrap();
    socket
}

/// Returns a counter of the kernel's IPv6 (`/proc/net/snmp6`).
pub fn snmp6(namespace: &Namespace, name: &str) -> u64 {
    let text = namespace.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp6").unwrap());
    text.lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(name)).then(|| words.next().unwrap().parse().unwrap())
        })
        .unwrap_or_else(|| panic!("no {name}"))
}

fn pair(one: &Namespace, interface: &str, other: &Namespace, peer: &str) {
    one.ip(&format!(
        "link add {interface} type veth peer name {peer} netns {}",
        other.name()
    ));
    one.ip(&format!("link set {interface} up"));
    other.ip(&format!("link set {peer} up"));
}
