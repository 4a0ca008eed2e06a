//! One node of MAT and its peers as the programs know them: in the kernel for program test-run, and
//! in memory for the same rules.

use std::collections::HashMap;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::time::Duration;

use aya::maps::{Array, HashMap as BpfMap, PerCpuArray, RingBuf};
use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use common::maps::Address;
use common::mat::counter::Counter;
use common::mat::maps::{Node, OwnMoa, Peer, PeerMoa};
use common::mat::neutral::{difference, neutral};
use common::mat::translate::{Tables, Translated, Words, address, mac, words};
use migkick::datapath::object;

/// Verdict "continue", `TC_ACT_UNSPEC`.
pub const PASS: i32 = -1;
/// Verdict "drop", `TC_ACT_SHOT`.
pub const SHOT: i32 = 2;
/// Verdict "sent to another interface", `TC_ACT_REDIRECT`.
pub const REDIRECT: i32 = 7;
/// Interface on which program test-run lets a frame arrive: the loopback.
pub const IFINDEX: u32 = 1;
/// MAC of the node's interface `mat0`.
pub const MAT0_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xaa];
/// MAC of the node's active NIC.
pub const NIC_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xbb];

/// Parses an IPv6 address.
pub fn parse(text: &str) -> Address {
    text.parse::<std::net::Ipv6Addr>().unwrap().octets()
}

/// The node and one peer.
#[derive(Clone, Debug)]
pub struct World {
    /// Permanent address of the node.
    pub hoa: Address,
    /// Address of the node's active NIC.
    pub moa: Address,
    /// Permanent address of the peer.
    pub peer_hoa: Address,
    /// Address at which the peer is now.
    pub peer_moa: Address,
    /// Content of the map `NODE`.
    pub node: Node,
    peers: HashMap<Words, Translated>,
    peer_moas: HashMap<Words, Translated>,
    own_moas: HashMap<Words, u32>,
}

impl World {
    /// Returns a world whose addresses leave checksums as they are.
    pub fn neutral() -> Self {
        let hoa = parse("fd5e:6d61:74::a");
        let peer_hoa = parse("fd5e:6d61:74::1234:b");
        Self::new(
            (hoa, neutral(parse("2001:db8:a::5:6:7:0"), hoa)),
            (peer_hoa, neutral(parse("2001:db8:b::9:8:7:0"), peer_hoa)),
        )
    }

    /// Returns a world whose addresses require checksum changes.
    pub fn given() -> Self {
        Self::new(
            (parse("fd5e:6d61:74::a"), parse("2001:db8:a::15")),
            (parse("fd5e:6d61:74::1234:b"), parse("2001:db8:b::77")),
        )
    }

    /// Returns a world from the HoA and MoA of the node and of its peer.
    pub fn new((hoa, moa): (Address, Address), (peer_hoa, peer_moa): (Address, Address)) -> Self {
        let to = |from, to| Translated {
            address: words(to),
            difference: difference(from, to),
        };
        let node = Node {
            hoa: words(hoa),
            moa: words(moa),
            home: words(parse("fd5e:6d61:74::")),
            home_mask: words(parse("ffff:ffff:ffff::")),
            multicast_source: words(parse("fe80::bb")),
            difference: difference(hoa, moa),
            difference_back: difference(moa, hoa),
            ifindex: 7,
            multicast_ifindex: IFINDEX,
            // Program test-run redirects copies here too.
            mat0_ifindex: IFINDEX,
            multicast_mac: mac(NIC_MAC),
            mat0_mac: mac(MAT0_MAC),
        };
        Self {
            hoa,
            moa,
            peer_hoa,
            peer_moa,
            node,
            peers: [(words(peer_hoa), to(peer_hoa, peer_moa))].into(),
            peer_moas: [(words(peer_moa), to(peer_moa, peer_hoa))].into(),
            own_moas: [(words(moa), difference(moa, hoa))].into(),
        }
    }

    /// Makes the programs change checksums, whatever the addresses are.
    pub fn change_checksums(&mut self) {
        self.node.difference = 0x1234;
        self.node.difference_back = 0x3456;
        for to in self.peers.values_mut().chain(self.peer_moas.values_mut()) {
            to.difference = 0x2345;
        }
        for difference in self.own_moas.values_mut() {
            *difference = 0x3456;
        }
    }
}

impl Tables for World {
    fn node(&self) -> Option<&Node> {
        Some(&self.node)
    }

    fn peer(&self, hoa: &Words) -> Option<Translated> {
        self.peers.get(hoa).copied()
    }

    fn peer_moa(&self, moa: &Words) -> Option<Translated> {
        self.peer_moas.get(moa).copied()
    }

    fn own_moa(&self, moa: &Words) -> Option<u32> {
        self.own_moas.get(moa).copied()
    }
}

/// The loaded programs, with a world in their maps.
pub struct Kernel {
    ebpf: Ebpf,
}

impl Kernel {
    /// Loads the programs and fills their maps.
    pub fn load(world: &World) -> Self {
        let mut ebpf = EbpfLoader::new().load(object::GUEST).unwrap();
        for name in ["mat_out", "mat_in"] {
            let program: &mut SchedClassifier = ebpf.program_mut(name).unwrap().try_into().unwrap();
            program
                .load()
                .unwrap_or_else(|error| panic!("Cannot load {name}: {error:?}"));
        }
        let mut kernel = Self { ebpf };
        kernel.set_node(world.node);
        for (hoa, to) in &world.peers {
            let value = Peer {
                moa: to.address,
                difference: to.difference,
                ..Peer::default()
            };
            let mut map: BpfMap<_, Address, Peer> =
                kernel.ebpf.map_mut("PEERS").unwrap().try_into().unwrap();
            map.insert(address(*hoa), value, 0).unwrap();
        }
        for (moa, to) in &world.peer_moas {
            let value = PeerMoa {
                hoa: to.address,
                difference: to.difference,
                ..PeerMoa::default()
            };
            let map = kernel.ebpf.map_mut("PEER_MOAS").unwrap();
            let mut map: BpfMap<_, Address, PeerMoa> = map.try_into().unwrap();
            map.insert(address(*moa), value, 0).unwrap();
        }
        for (moa, difference) in &world.own_moas {
            let value = OwnMoa {
                difference: *difference,
            };
            let map = kernel.ebpf.map_mut("OWN_MOAS").unwrap();
            let mut map: BpfMap<_, Address, OwnMoa> = map.try_into().unwrap();
            map.insert(address(*moa), value, 0).unwrap();
        }
        kernel
    }

    /// Replaces the content of the map `NODE`.
    pub fn set_node(&mut self, node: Node) {
        let mut map: Array<_, Node> = self.ebpf.map_mut("NODE").unwrap().try_into().unwrap();
        map.set(0, node, 0).unwrap();
    }

    /// Runs a program. Returns its result and the resulting frame.
    pub fn run(&mut self, name: &str, frame: &[u8]) -> (i32, Vec<u8>) {
        let mut out = vec![0; frame.len()];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        };
        let result = self.program(name).test_run(options).unwrap();
        (result.return_value.cast_signed(), out)
    }

    /// Runs a program repeatedly. Returns the mean time.
    pub fn time(&mut self, name: &str, frame: &[u8], repeat: u32) -> Duration {
        let options = TestRunOptions {
            data_in: Some(frame),
            repeat,
            ..TestRunOptions::new()
        };
        self.program(name).test_run(options).unwrap().duration
    }

    /// Returns the file descriptor of a program.
    pub fn descriptor(&mut self, name: &str) -> RawFd {
        self.program(name).fd().unwrap().as_fd().as_raw_fd()
    }

    /// Takes the held frames. Returns their lengths.
    pub fn held(&mut self) -> Vec<Vec<u8>> {
        let map = self.ebpf.map_mut("HELD").unwrap();
        let mut ring: RingBuf<_> = map.try_into().unwrap();
        let mut records = Vec::new();
        while let Some(record) = ring.next() {
            records.push(record.to_vec());
        }
        records
    }

    /// Returns the entry of a peer in the map `PEERS`.
    pub fn peer(&mut self, hoa: Address) -> Peer {
        let map: BpfMap<_, Address, Peer> = self.ebpf.map("PEERS").unwrap().try_into().unwrap();
        map.get(&hoa, 0).unwrap()
    }

    /// Returns all counters that are not zero.
    pub fn counted(&self) -> Vec<(Counter, u64)> {
        let map = self.ebpf.map("MAT_COUNTERS").unwrap();
        let map: PerCpuArray<_, u64> = map.try_into().unwrap();
        (0..)
            .zip(Counter::ALL)
            .map(|(index, counter)| (*counter, map.get(&index, 0).unwrap().iter().sum()))
            .filter(|(_, value)| *value != 0)
            .collect()
    }

    fn program(&mut self, name: &str) -> &mut SchedClassifier {
        self.ebpf.program_mut(name).unwrap().try_into().unwrap()
    }
}
