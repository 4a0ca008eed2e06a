//! The trait through which every parser reads a packet.
//!
//! The kernel programs implement the trait over `bpf_skb_load_bytes`, userspace over a byte slice,
//! so the same parser runs in both.

/// The packet ends before the requested bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truncated;

/// Read access to one packet, from its first Ethernet byte.
pub trait PacketRead {
    /// Length of the packet in bytes.
    fn len(&self) -> usize;

    /// Returns `N` bytes from `offset` on.
    ///
    /// # Errors
    ///
    /// [`Truncated`] when the packet has fewer than `offset + N` bytes.
    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Truncated>;

    /// VLAN identifier in the metadata, where the NIC or the kernel put it; 0 for none.
    fn vlan_metadata(&self) -> u16 {
        0
    }

    /// Whether the packet has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl PacketRead for [u8] {
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    fn read<const N: usize>(&self, offset: usize) -> Result<[u8; N], Truncated> {
        let end = offset.checked_add(N).ok_or(Truncated)?;
        self.get(offset..end)
            .and_then(|bytes| bytes.try_into().ok())
            .ok_or(Truncated)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_beyond_the_end_is_truncated() {
        let packet: &[u8] = &[1, 2, 3];
        assert_eq!(packet.read::<2>(1), Ok([2, 3]));
        assert_eq!(packet.read::<2>(2), Err(Truncated));
        assert_eq!(packet.read::<1>(usize::MAX), Err(Truncated));
    }
}
