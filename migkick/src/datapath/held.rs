//! Frames that wait for the MoA of their peer: checksums, and the ICMPv6 error if the peer stays
//! unknown.
//!
//! The kernel leaves a packet's checksum to the device, and the ring buffer holds the packet as it
//! was before that. The daemon sends the packet again as an ordinary frame, so nobody else
//! completes its checksum.

use std::net::Ipv6Addr;

use common::packet::PacketRead;
use common::wire::{checksum, ethernet, ipv6, udp};

/// A frame to a peer without a known MoA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldFrame {
    /// HoA of the peer, the destination of the frame.
    pub peer: Ipv6Addr,
    /// The frame, from the Ethernet header on. Empty for a frame too long to hold; its sender was
    /// told of the loss.
    pub frame: Vec<u8>,
}

const PAYLOAD: usize = ethernet::HEADER_BYTES + ipv6::HEADER_BYTES;
const TCP: u8 = 6;
const ICMPV6: u8 = 58;
/// ICMPv6 type Destination Unreachable, and the code for an address (RFC 4443 §3.1).
const UNREACHABLE: u8 = 1;
const ADDRESS_UNREACHABLE: u8 = 3;
const FIRST_INFORMATIONAL: u8 = 128;
/// Longest ICMPv6 error with its quotation, without the Ethernet header (RFC 4443 §2.4 (c)).
const MAX_ERROR_BYTES: usize = 1280;
const HOP_LIMIT: u8 = 64;

/// Recomputes the checksum of a TCP or UDP packet. Packets of other protocols have complete
/// checksums already.
pub(super) fn finish_checksum(frame: &mut [u8]) {
    let Ok(header) = ipv6::parse(&*frame, ethernet::HEADER_BYTES) else {
        return;
    };
    let place = match header.next_header {
        TCP => PAYLOAD + 16,
        udp::NEXT_HEADER => PAYLOAD + 6,
        _ => return,
    };
    set_checksum(frame, &header, place);
}

fn set_checksum(frame: &mut [u8], header: &ipv6::Header, place: usize) {
    let length = usize::from(header.payload_length);
    if frame.len() < PAYLOAD + length || place + 2 > PAYLOAD + length {
        return;
    }
    if let Some(field) = frame.get_mut(place..place + 2) {
        field.fill(0);
    }
    let Ok(sum) = checksum::sum(&*frame, PAYLOAD, length) else {
        return;
    };
    let pseudo = checksum::pseudo_header(
        &header.source,
        &header.destination,
        header.payload_length.into(),
        header.next_header,
    );
    let value = match !checksum::fold(sum + pseudo) {
        0 => 0xffff_u16,
        value => value,
    };
    if let Some(field) = frame.get_mut(place..place + 2) {
        field.copy_from_slice(&value.to_ne_bytes());
    }
}

/// Builds the frame with the ICMPv6 error that reports an unreachable peer to the sender, for
/// `mac`. `None` for packets that must not cause an error (RFC 4443 §2.4 (e)).
pub(super) fn unreachable(frame: &[u8], mac: [u8; 6]) -> Option<Vec<u8>> {
    let about = ipv6::parse(frame, ethernet::HEADER_BYTES).ok()?;
    if about.next_header == ICMPV6 {
        let [kind] = frame.read(PAYLOAD).ok()?;
        if kind < FIRST_INFORMATIONAL {
            return None;
        }
    }
    let quoted = frame.get(ethernet::HEADER_BYTES..)?;
    let quoted = quoted
        .get(..MAX_ERROR_BYTES - ipv6::HEADER_BYTES - 8)
        .unwrap_or(quoted);
    let length = u16::try_from(8 + quoted.len()).ok()?;
    let mut error = Vec::with_capacity(PAYLOAD + usize::from(length));
    error.extend(mac);
    error.extend(mac);
    error.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
    error.extend(length.to_be_bytes());
    error.extend([ICMPV6, HOP_LIMIT]);
    error.extend(about.source);
    error.extend(about.source);
    error.extend([UNREACHABLE, ADDRESS_UNREACHABLE, 0, 0, 0, 0, 0, 0]);
    error.extend(quoted);
    let header = ipv6::parse(error.as_slice(), ethernet::HEADER_BYTES).ok()?;
    set_checksum(&mut error, &header, PAYLOAD + 2);
    Some(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn udp(payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        let length = u16::try_from(8 + payload.len()).unwrap();
        frame.extend(length.to_be_bytes());
        frame.extend([17, 64]);
        frame.extend([0xfd; 16]);
        frame.extend([0xfc; 16]);
        frame.extend([0, 1, 0, 2]);
        frame.extend(length.to_be_bytes());
        frame.extend([0xab, 0xcd]);
        frame.extend(payload);
        frame
    }

    /// The checksum over header and payload; 0xffff if the checksum field is correct.
    fn whole_sum(frame: &[u8]) -> u16 {
        let header = ipv6::parse(frame, ethernet::HEADER_BYTES).unwrap();
        let length = header.payload_length;
        let sum = checksum::sum(frame, PAYLOAD, length.into()).unwrap();
        let pseudo = checksum::pseudo_header(
            &header.source,
            &header.destination,
            length.into(),
            header.next_header,
        );
        checksum::fold(sum + pseudo)
    }

    #[test]
    fn whatever_stood_in_its_place_the_checksum_is_right_afterwards() {
        for payload in [&b""[..], b"odd", &[7; 1400]] {
            let mut frame = udp(payload);
            assert_ne!(whole_sum(&frame), 0xffff);
            finish_checksum(&mut frame);
            assert_eq!(whole_sum(&frame), 0xffff);
        }
    }

    #[test]
    fn a_frame_that_is_cut_off_stays_as_it_is() {
        let frame = udp(b"1234");
        for length in 0..frame.len() {
            let mut cut = frame[..length].to_vec();
            finish_checksum(&mut cut);
            assert_eq!(cut, frame[..length]);
            let _ = unreachable(&cut, MAC);
        }
    }

    #[test]
    fn error_quotes_as_much_as_it_may_and_is_to_the_sender() {
        let frame = udp(&[7; 1400]);
        let error = unreachable(&frame, MAC).unwrap();
        assert_eq!(error.len(), ethernet::HEADER_BYTES + MAX_ERROR_BYTES);
        assert_eq!(whole_sum(&error), 0xffff);
        assert_eq!(error[38..54], frame[22..38]);
        let quoted = &error[PAYLOAD + 8..];
        assert_eq!(quoted, &frame[ethernet::HEADER_BYTES..][..quoted.len()]);
        assert_eq!(unreachable(&error, MAC), None);
    }
}
