//! A TAP behind a bridge, and frames that enter the TAP.

use std::fs::File;
use std::io::{Read as _, Write as _};

use common::maps::{BridgeNumber, StreamKey};
use common::testing::frame::{Frame, address};
use roamcast::datapath::{Datapath, DatapathConfig};

use super::host::LIMITS;
use super::netns::{Namespace, wait_for};
use super::tap;
use super::wire::Wire;

/// Multicast address of the stream.
pub const GROUP: &str = "ff3e:1::1234";
/// Address of a scope that no gate processes.
const PROBE: &str = "ff02::1234";
/// Source address of the stream.
pub const SOURCE: &str = "2001:db8::1";

/// A host with a TAP behind a bridge, which a sender can reach.
pub struct Bridged {
    /// Namespace with the bridge and the TAP.
    pub host: Namespace,
    /// Namespace of the sender, behind `up0`.
    pub network: Namespace,
    /// One file per queue of the TAP.
    pub taps: Vec<File>,
    /// Bytes in front of each frame that is read from the TAP.
    header_bytes: usize,
    /// Interface index of the TAP.
    pub ifindex: u32,
    /// Wire of the sender into the bridge.
    pub sender: Wire,
}

impl Bridged {
    /// Makes a TAP with one queue, as a program reads it.
    pub fn new() -> Self {
        Self::with(|name| vec![tap::open(name)], 0)
    }

    /// Makes a TAP with this many queues, as vhost-net reads it.
    pub fn with_queues(queues: usize) -> Self {
        Self::with(|name| tap::open_queues(name, queues), tap::HEADER_BYTES)
    }

    fn with(open: impl FnOnce(&str) -> Vec<File> + Send, header_bytes: usize) -> Self {
        let (host, network) = (Namespace::new("host"), Namespace::new("network"));
        host.add_bridge("br0");
        host.add_peer("br0", "up0", &network, "n0");
        let taps = host.run(|| open("vnet0"));
        host.ip("link set vnet0 master br0 up");
        let ifindex = host.ifindex("vnet0");
        let n0 = network.ifindex("n0");
        let sender = network.run(|| Wire::new(n0));
        let bridged = Self {
            host,
            network,
            taps,
            header_bytes,
            ifindex,
            sender,
        };
        // The bridge notices the link's state with a delay.
        let probe = Frame::udp(SOURCE, PROBE, (1, 2), b"probe").bytes();
        wait_for("the bridge", || {
            bridged.sender.send(&probe);
            bridged.received().contains(&probe).then_some(())
        });
        bridged
    }

    /// Returns the frames that came out of the TAP, as the VM would receive them.
    pub fn received(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut frame = vec![0; 65_536];
        for mut tap in &self.taps {
            while let Ok(length) = tap.read(&mut frame) {
                frames.push(frame[self.header_bytes..length].to_vec());
            }
        }
        frames
    }

    /// Sends a frame as the VM.
    pub fn transmit(&self, frame: &[u8]) {
        let mut tap = &self.taps[0];
        let sent = tap.write(frame).unwrap();
        assert_eq!(sent, frame.len());
    }

    /// Waits until a frame comes out of the TAP. Returns the frames of the flow up to it.
    pub fn received_up_to(&self, last: &[u8]) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        wait_for("the last frame", || {
            frames.extend(self.received());
            frames.iter().any(|frame| frame == last).then_some(())
        });
        frames.retain(|frame| frame.get(38..54) == Some(&address(GROUP)));
        frames
    }

    /// Attaches an agent's data path to the TAP.
    pub fn attach(&self, config: &DatapathConfig) -> Datapath {
        let datapath = Datapath::load(config).unwrap();
        datapath
            .attach_port(self.ifindex, "vnet0", &LIMITS)
            .unwrap();
        datapath
    }
}

/// Returns a frame of the stream with this payload.
pub fn udp(payload: &[u8]) -> Vec<u8> {
    Frame::udp(SOURCE, GROUP, (5000, 5004), payload).bytes()
}

/// Returns the key of the stream; VLAN 0 stands for untagged frames.
pub fn stream(vlan: u16) -> StreamKey {
    StreamKey {
        multicast_address: address(GROUP),
        source: address(SOURCE),
        source_port: 5000,
        destination_port: 5004,
        vlan,
        bridge: BridgeNumber::FIRST,
    }
}
