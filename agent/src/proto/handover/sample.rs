//! Packets of synthetic flows, for tests.

use common::maps::{NO_BRIDGE, StreamKey};

/// Returns the flow with the given number.
pub(super) fn stream(number: u16) -> StreamKey {
    let mut multicast_address = [0; 16];
    multicast_address[..2].copy_from_slice(&[0xff, 0x15]);
    multicast_address[14..].copy_from_slice(&number.to_be_bytes());
    StreamKey {
        multicast_address,
        source: [0x20; 16],
        source_port: 5000,
        destination_port: 6000 + number,
        vlan: 0,
        bridge: NO_BRIDGE,
    }
}

/// Returns an untagged UDP datagram of a flow, with the given checksum field.
pub(super) fn datagram(stream: &StreamKey, checksum: u16, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u16 + 8).to_be_bytes();
    let mut frame = vec![0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x86, 0xdd];
    frame.extend([0x60, 0, 0, 0]);
    frame.extend(length);
    frame.extend([17, 64]);
    frame.extend(stream.source);
    frame.extend(stream.multicast_address);
    frame.extend(stream.source_port.to_be_bytes());
    frame.extend(stream.destination_port.to_be_bytes());
    frame.extend(length);
    frame.extend(checksum.to_be_bytes());
    frame.extend(payload);
    frame
}
