//! The 802.1Q tag of a frame, which a network card may have taken out.

use common::wire::ethernet;

/// Where the tag stands, bytes from the first of the frame.
const TAG: usize = 12;

/// A frame with its tag in its place, if it has one in metadata.
pub(super) fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    let vlan = vlan & ethernet::VLAN_IDENTIFIER;
    match frame.split_at_checked(TAG) {
        Some((addresses, rest)) if vlan != 0 => {
            let tag = [ethernet::VLAN.to_be_bytes(), vlan.to_be_bytes()];
            [addresses, tag.as_flattened(), rest].concat()
        }
        _ => frame.to_vec(),
    }
}
