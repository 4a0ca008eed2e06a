//! Frames that a hostile VM or neighbour may send.

use std::net::Ipv6Addr;
use std::sync::atomic::{AtomicBool, Ordering};

use common::signal::{AgentSearch, PORT, VmMessage};
use common::testing::frame::{Frame, MAC, address, record};
use nix::ifaddrs::getifaddrs;

/// Sets the flag on drop, so that the test's threads also end after a panic.
pub struct EndOf<'a>(pub &'a AtomicBool);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Name of a kind of frames, with frames to send repeatedly.
type Kind = (&'static str, Vec<Vec<u8>>);

/// Returns a multicast address by number.
pub fn group(number: usize) -> String {
    format!("ff3e:1::4:{number:x}")
}

/// Returns a Report by which a VM joins a numbered group.
pub fn report(number: usize) -> Frame {
    Frame::report(&[record(4, &group(number), &[])])
}

/// Returns Reports, one per numbered group, that RFC 9777 forbids and a bridge accepts.
pub fn forbidden() -> Vec<Frame> {
    let destination_options = || vec![(60, vec![0, 1, 4, 0, 0, 0, 0])];
    let authentication = || vec![(51, vec![1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])];
    let fragment = || (44, vec![0, 0, 0, 0, 0, 0, 7]);
    vec![
        report(0).with(|f| f.hop_limit = 64),
        report(1).with(|f| f.source = address("2001:db8::1")),
        report(2).with(|f| f.options = Some(vec![1, 4, 0, 0, 0, 0])),
        report(3).with(|f| f.headers = destination_options()),
        report(4).with(|f| f.headers = authentication()),
        report(5).with(|f| f.headers = vec![fragment()]),
        report(6).with(|f| f.headers = [vec![fragment()], destination_options()].concat()),
        report(7).with(|f| {
            f.options = Some(vec![1, 4, 0, 0, 0, 0]);
            f.headers = destination_options();
        }),
        Frame::v1(131, &group(8)).with(|f| f.hop_limit = 2),
        // Longer than a page, the most that Linux sends.
        Frame::report(&vec![record(4, &group(9), &[]); 300]),
    ]
}

/// Returns frames of every kind that Roamcast examines, for the bridge with that MAC.
pub fn kinds(bridge: [u8; 6]) -> Vec<Kind> {
    let to_host = |frame: Frame| {
        let mut bytes = frame.bytes();
        bytes[..6].copy_from_slice(&bridge);
        bytes
    };
    let agent = link_local(bridge);
    let reports = (0..8192).map(|number| report(number).bytes());
    let changes = (0..8192).map(|number| {
        let group = group(number);
        let leave = record(3, &group, &[]);
        Frame::report(&[leave, record(6, &group, &["2001:db8::1"])]).bytes()
    });
    let queries = [
        Frame::query("::", 1, Some((1, 1))),
        Frame::query("::", 65_535, Some((7, 255))),
        Frame::query("::", 10, None),
        Frame::query(&group(1), 1, Some((1, 1))),
    ];
    let datagrams = (0..256).map(|number| {
        let mut message = VmMessage::from(AgentSearch {}).encode(number);
        if number % 4 == 3 {
            message.truncate(number as usize % message.len());
        }
        let frame = Frame::udp("fe80::2a", &agent, (40_000, PORT), &message);
        to_host(frame.with(|it| it.checksum = true))
    });
    let advertisements = (0..=u8::MAX).map(|number| {
        let mut body = vec![136, 0, 0, 0, 0x60, 0, 0, 0];
        body.extend(address(&format!("2001:db8::{number:x}")));
        body.extend([2, 1]);
        body.extend(MAC);
        let frame = Frame::icmpv6(body, &agent).with(|it| {
            it.options = None;
            it.hop_limit = 255;
        });
        to_host(frame)
    });
    // The tenth is longer than the MTU of 1500 bytes allows.
    let malformed = forbidden().into_iter().take(9);
    vec![
        ("Reports", reports.chain(changes).collect()),
        ("Queries", queries.iter().map(Frame::bytes).collect()),
        ("malformed MLD", malformed.map(|it| it.bytes()).collect()),
        ("datagrams to the agent", datagrams.collect()),
        ("Neighbor Advertisements", advertisements.collect()),
    ]
}

/// Returns the MAC of an interface in the namespace of the calling thread.
pub fn mac(interface: &str) -> [u8; 6] {
    let mut interfaces = getifaddrs().unwrap();
    let found = interfaces.find_map(|it| {
        let is_it = it.interface_name == interface;
        it.address?.as_link_addr()?.addr().filter(|_| is_it)
    });
    found.unwrap()
}

fn link_local([a, b, c, d, e, f]: [u8; 6]) -> String {
    let identifier = [a ^ 2, b, c, 0xff, 0xfe, d, e, f];
    let address = [[0xfe, 0x80, 0, 0, 0, 0, 0, 0], identifier].concat();
    let address: [u8; 16] = address.try_into().unwrap();
    Ipv6Addr::from(address).to_string()
}
