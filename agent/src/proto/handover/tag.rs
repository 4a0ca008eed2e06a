//! Restores the 802.1Q tag of a frame that a network card stripped.

use common::wire::ethernet;

/// Offset of the tag, bytes from the start of the frame.
const TAG: usize = 12;

/// Returns a frame with its tag inserted; `vlan` is the identifier from the metadata, 0 for none.
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
