//! The sender's log: the time of sending of each packet.
//!
//! # Wire format
//!
//! The log consists of little-endian records of 14 bytes: flow (2), sequence number (4), time of
//! sending in nanoseconds of the host's monotonic clock (8). The reader ignores an incomplete
//! record at the end of the file, because the sender may have been killed.

use std::path::Path;

use anyhow::{Context as _, Result};

/// Length of a record in bytes.
pub const RECORD_LEN: usize = 14;

/// One packet sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Flow, as in the packet's stamp.
    pub flow: u16,
    /// Sequence number, as in the packet's stamp.
    pub sequence: u32,
    /// Time of sending, in nanoseconds of the host's monotonic clock.
    pub sent_ns: u64,
}

impl Sent {
    /// Returns the record.
    pub fn to_bytes(self) -> [u8; RECORD_LEN] {
        let mut bytes = [0; RECORD_LEN];
        bytes[0..2].copy_from_slice(&self.flow.to_le_bytes());
        bytes[2..6].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[6..14].copy_from_slice(&self.sent_ns.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; RECORD_LEN]) -> Self {
        let [a, b, c, d, e, f, rest @ ..] = *bytes;
        Self {
            flow: u16::from_le_bytes([a, b]),
            sequence: u32::from_le_bytes([c, d, e, f]),
            sent_ns: u64::from_le_bytes(rest),
        }
    }
}

/// Returns all whole records.
pub fn parse(bytes: &[u8]) -> Vec<Sent> {
    bytes
        .as_chunks::<RECORD_LEN>()
        .0
        .iter()
        .map(Sent::from_bytes)
        .collect()
}

/// Reads a log file.
///
/// # Errors
///
/// When the file cannot be read.
pub fn read(path: &Path) -> Result<Vec<Sent>> {
    let bytes = std::fs::read(path)
        .with_context(|| format!("Cannot read the sender's log {}", path.display()))?;
    Ok(parse(&bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn record_survives_and_a_cut_one_is_ignored(flow: u16, sequence: u32, sent_ns: u64) {
            let sent = Sent { flow, sequence, sent_ns };
            let mut bytes = sent.to_bytes().to_vec();
            bytes.extend([1; RECORD_LEN - 1]);
            prop_assert_eq!(parse(&bytes), [sent]);
        }
    }
}
