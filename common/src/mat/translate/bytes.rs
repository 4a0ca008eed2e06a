//! [`Packet`] over a frame in memory with a full checksum.

use super::{
    ADDRESSES, Head, Mac, PAYLOAD, Packet, QUOTED, QUOTED_ADDRESSES, QUOTED_PAYLOAD, Words,
    address, words,
};
use crate::packet::{PacketRead, Truncated};
use crate::wire::checksum;

/// A frame in memory, from its Ethernet header on.
#[derive(Debug)]
pub struct Bytes<'a>(pub &'a mut [u8]);

impl Bytes<'_> {
    fn write<const N: usize>(&mut self, offset: usize, bytes: [u8; N]) -> bool {
        match self.0.get_mut(offset..offset + N) {
            Some(place) => {
                place.copy_from_slice(&bytes);
                true
            }
            None => false,
        }
    }

    fn header(&self, offset: usize) -> Result<Head, Truncated> {
        Ok(Head {
            start: u64::from_ne_bytes(self.read(offset)?),
            source: words(self.read(offset + 8)?),
            destination: words(self.read(offset + 24)?),
        })
    }
}

fn mac_bytes([first, second, third]: Mac) -> [u8; 6] {
    let ([a, b], [c, d], [e, f]) = (
        first.to_ne_bytes(),
        second.to_ne_bytes(),
        third.to_ne_bytes(),
    );
    [a, b, c, d, e, f]
}

impl PacketRead for Bytes<'_> {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Truncated> {
        PacketRead::read(&*self.0, offset)
    }
}

impl Packet for Bytes<'_> {
    fn head(&self) -> Option<(u16, Head)> {
        let ether_type = self.read(12).ok()?;
        Some((u16::from_ne_bytes(ether_type), self.header(14).ok()?))
    }

    fn payload(&self) -> Option<[u8; 8]> {
        self.read(PAYLOAD).ok()
    }

    fn quoted(&self) -> Option<Head> {
        self.header(QUOTED).ok()
    }

    fn set_addresses(&mut self, source: Words, destination: Words) -> bool {
        self.write(ADDRESSES, address(source)) && self.write(ADDRESSES + 16, address(destination))
    }

    fn set_quoted_addresses(&mut self, source: Words, destination: Words) -> bool {
        self.0.len() >= QUOTED_PAYLOAD
            && self.write(QUOTED_ADDRESSES, address(source))
            && self.write(QUOTED_ADDRESSES + 16, address(destination))
    }

    fn set_destination_mac(&mut self, mac: Mac) -> bool {
        self.write(0, mac_bytes(mac))
    }

    fn set_source_mac(&mut self, mac: Mac) -> bool {
        self.write(6, mac_bytes(mac))
    }

    fn update_full_checksum(&mut self, _next_header: u8, _difference: u32) -> bool {
        false
    }

    fn update_checksum(&mut self, offset: usize, difference: u32, may_be_none: bool) -> bool {
        let Ok(before) = self.read(offset) else {
            return false;
        };
        let before = u16::from_ne_bytes(before);
        if may_be_none && before == 0 {
            return true;
        }
        // RFC 1624: HC' = ~(~HC + ~m + m').
        let after = !checksum::fold(u64::from(!before) + u64::from(difference));
        let after = if may_be_none && after == 0 {
            0xffff
        } else {
            after
        };
        self.write(offset, after.to_ne_bytes())
    }
}
