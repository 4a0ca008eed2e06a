//! The stamp at the start of every datagram of the probe's own stream.
//!
//! The rest of the datagram is padding up to the configured size.

/// First bytes of every datagram of the probe.
const MAGIC: [u8; 4] = *b"RCST";

/// Length of the stamp, bytes. The UDP payload of the stream cannot be shorter.
pub const STAMP_LEN: usize = 24;

/// Identity of one datagram, and its time of sending.
///
/// # Wire format
///
/// All numbers are in network byte order.
///
/// | offset | length | field |
/// |---|---|---|
/// | 0 | 4 | `RCST` |
/// | 4 | 2 | flow |
/// | 6 | 2 | zero |
/// | 8 | 4 | sequence number within the flow, from zero |
/// | 12 | 4 | zero |
/// | 16 | 8 | time of sending, the sender's monotonic clock, nanoseconds |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Number of the flow: the index of its multicast address at the sender.
    pub flow: u16,
    /// Sequence number within the flow, from zero.
    pub sequence: u32,
    /// Time of sending in the sender's monotonic clock, in nanoseconds.
    pub sent_ns: u64,
}

impl Stamp {
    /// Returns the bytes of the stamp.
    pub fn to_bytes(self) -> [u8; STAMP_LEN] {
        let mut bytes = [0; STAMP_LEN];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&self.flow.to_be_bytes());
        bytes[8..12].copy_from_slice(&self.sequence.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.sent_ns.to_be_bytes());
        bytes
    }

    /// Returns the stamp of a datagram; `None` if the datagram is not one of the probe's.
    pub fn parse(datagram: &[u8]) -> Option<Self> {
        let (stamp, _padding) = datagram.split_first_chunk::<STAMP_LEN>()?;
        if stamp[0..4] != MAGIC {
            return None;
        }
        let (sequence, sent) = (
            stamp[8..12].try_into().ok()?,
            stamp[16..24].try_into().ok()?,
        );
        Some(Self {
            flow: u16::from_be_bytes([stamp[4], stamp[5]]),
            sequence: u32::from_be_bytes(sequence),
            sent_ns: u64::from_be_bytes(sent),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn foreign_datagram_has_no_stamp() {
        assert_eq!(Stamp::parse(&[0; 1450]), None);
    }

    #[test]
    fn truncated_stamp_is_refused_at_every_length() {
        let bytes = Stamp {
            flow: 1,
            sequence: 2,
            sent_ns: 3,
        }
        .to_bytes();
        for length in 0..STAMP_LEN {
            assert_eq!(Stamp::parse(&bytes[..length]), None);
        }
    }

    proptest! {
        #[test]
        fn stamp_survives_the_wire(flow: u16, sequence: u32, sent_ns: u64, padding: Vec<u8>) {
            let stamp = Stamp { flow, sequence, sent_ns };
            let mut datagram = stamp.to_bytes().to_vec();
            datagram.extend(padding);
            prop_assert_eq!(Stamp::parse(&datagram), Some(stamp));
        }

        #[test]
        fn any_bytes_parse_without_panic(bytes: Vec<u8>) {
            let _ = Stamp::parse(&bytes);
        }
    }
}
