//! Fuzz targets: properties that hold for any input bytes.
//!
//! libFuzzer calls the targets with generated inputs (`cargo xtask fuzz`); the unit tests call them
//! with the corpus in `tests/fuzz`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what fails here is what is looked for"
)]

mod frames;
mod mld;
mod signalling;
mod translate;

/// Name and body of a target.
pub type Target = (&'static str, fn(&[u8]));

/// Every target, by the name of its corpus folder.
pub const TARGETS: &[Target] = &[
    ("signalling", signalling::run),
    ("mld", mld::run),
    ("frames", frames::run),
    ("neighbour", frames::neighbour),
    ("relayed", frames::relayed),
    ("translate", translate::run),
];

/// Writes the right checksum into the ICMPv6 message at `start`, which no fuzzer would guess.
fn finish(frame: &mut [u8], start: usize) {
    use crate::wire::{checksum, ipv6, mld};

    let Some(head) = mld::ipv6_frame(&*frame) else {
        return;
    };
    let ipv6::Header {
        source,
        destination,
        payload_length,
        ..
    } = head.header;
    let end = head.payload + usize::from(payload_length);
    let (Some(length), Some(place)) = (end.checked_sub(start), frame.get_mut(start + 2..start + 4))
    else {
        return;
    };
    place.fill(0);
    if let Ok(sum) = checksum::sum_within::<_, { mld::MAX_BYTES }>(&*frame, start, length) {
        let pseudo = checksum::pseudo_header(&source, &destination, length as u32, mld::ICMPV6);
        let sum = !checksum::fold(sum + pseudo);
        frame[start + 2..start + 4].copy_from_slice(&sum.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::corpus;

    use super::*;

    #[test]
    fn all_inputs_that_were_found_are_taken() {
        corpus::replay(TARGETS);
    }
}
