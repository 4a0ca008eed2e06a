//! MPEG-TS over UDP or RTP: continuity counters (ISO/IEC 13818-1 section 2.4.3.3, RFC 2250).
//!
//! Each 188-byte packet with payload carries a 4-bit counter per PID. A step other than one is a
//! continuity error, which viewers see as a broken picture. One repetition of the same counter is
//! an allowed duplicate. Packets without payload do not count, null packets have no counter, and a
//! set discontinuity indicator announces a jump.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::guest::wire::TransportTotals;

/// Length of a transport stream packet in bytes.
pub const PACKET_LEN: usize = 188;

const SYNC_BYTE: u8 = 0x47;
const NULL_PID: u16 = 0x1fff;
const RTP_FIXED_HEADER_LEN: usize = 12;

/// Returns a null packet (ISO/IEC 13818-1 section 2.4.1). All null packets are identical, because
/// they carry no data.
pub fn null_packet() -> [u8; PACKET_LEN] {
    let mut packet = [0xff; PACKET_LEN];
    let [high, low] = NULL_PID.to_be_bytes();
    // 0x10: a payload, no adaptation field, counter 0.
    packet[..4].copy_from_slice(&[SYNC_BYTE, high, low, 0x10]);
    packet
}

/// Reason why a datagram is not MPEG-TS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum MpegTsError {
    /// The length is zero or no multiple of 188 bytes.
    #[error("Datagram carries {length} bytes, which is no whole number of 188-byte TS packets")]
    Length {
        /// Length in bytes without an RTP header.
        length: usize,
    },
    /// A packet does not begin with 0x47.
    #[error("TS packet {index} of the datagram begins with {byte:#04x} instead of 0x47")]
    Sync {
        /// Index of the packet in the datagram.
        index: usize,
        /// Byte in place of the sync byte.
        byte: u8,
    },
    /// The datagram ends within its RTP header.
    #[error("Datagram ends within its RTP header")]
    Rtp,
}

#[derive(Clone, Copy, Debug)]
struct PidState {
    counter: u8,
    has_repeated: bool,
    errors: u64,
}

/// Checks the continuity counters of one stream.
#[derive(Clone, Debug, Default)]
pub struct Checker {
    pids: BTreeMap<u16, PidState>,
    totals: TransportTotals,
    rtp_sequence: Option<u16>,
}

impl Checker {
    /// Checks every packet of a datagram. A broken datagram changes no counter.
    ///
    /// # Errors
    ///
    /// When the datagram is not MPEG-TS, with or without RTP.
    pub fn handle_datagram(&mut self, datagram: &[u8]) -> Result<(), MpegTsError> {
        let (rtp_sequence, packets) = strip_rtp(datagram)?;
        if packets.is_empty() || packets.len() % PACKET_LEN != 0 {
            return Err(MpegTsError::Length {
                length: packets.len(),
            });
        }
        for (index, packet) in packets.chunks_exact(PACKET_LEN).enumerate() {
            if packet[0] != SYNC_BYTE {
                return Err(MpegTsError::Sync {
                    index,
                    byte: packet[0],
                });
            }
        }
        if let Some(sequence) = rtp_sequence {
            let expected = self.rtp_sequence.map(|last| last.wrapping_add(1));
            if expected.is_some_and(|expected| expected != sequence) {
                self.totals.rtp_gaps += 1;
            }
            self.rtp_sequence = Some(sequence);
        }
        self.totals.datagrams += 1;
        for packet in packets.chunks_exact(PACKET_LEN) {
            self.handle_packet(packet);
        }
        Ok(())
    }

    /// Returns the totals since the start.
    pub fn totals(&self) -> TransportTotals {
        self.totals
    }

    /// Returns PID and continuity errors of every PID seen, in the order of PIDs.
    pub fn errors_by_pid(&self) -> impl Iterator<Item = (u16, u64)> {
        self.pids.iter().map(|(pid, state)| (*pid, state.errors))
    }

    fn handle_packet(&mut self, packet: &[u8]) {
        self.totals.packets += 1;
        let pid = u16::from_be_bytes([packet[1] & 0x1f, packet[2]]);
        let (has_adaptation, has_payload) = (packet[3] & 0x20 != 0, packet[3] & 0x10 != 0);
        let counter = packet[3] & 0x0f;
        if pid == NULL_PID {
            return;
        }
        // An adaptation field begins with its length and a byte of flags. The first flag is the
        // discontinuity indicator.
        let is_announced = has_adaptation && packet[4] > 0 && packet[5] & 0x80 != 0;
        let Some(state) = self.pids.get_mut(&pid) else {
            self.pids.insert(
                pid,
                PidState {
                    counter,
                    has_repeated: false,
                    errors: 0,
                },
            );
            return;
        };
        if is_announced {
            *state = PidState {
                counter,
                has_repeated: false,
                ..*state
            };
        } else if has_payload {
            if counter == state.counter && !state.has_repeated {
                state.has_repeated = true;
                self.totals.duplicates += 1;
                return;
            }
            if counter != (state.counter + 1) & 0x0f {
                state.errors += 1;
                self.totals.continuity_errors += 1;
            }
            *state = PidState {
                counter,
                has_repeated: false,
                ..*state
            };
        }
    }
}

/// Returns the RTP sequence number, if there is an RTP header, and the bytes after the header.
fn strip_rtp(datagram: &[u8]) -> Result<(Option<u16>, &[u8]), MpegTsError> {
    // An RTP header has version 2 in its top two bits. An MPEG-TS packet begins with 0x47, which
    // would be version 1.
    if datagram.first().is_none_or(|first| first >> 6 != 2) {
        return Ok((None, datagram));
    }
    let (header, rest) = datagram
        .split_first_chunk::<RTP_FIXED_HEADER_LEN>()
        .ok_or(MpegTsError::Rtp)?;
    let sequence = u16::from_be_bytes([header[2], header[3]]);
    let sources = usize::from(header[0] & 0x0f) * 4;
    let rest = rest.get(sources..).ok_or(MpegTsError::Rtp)?;
    if header[0] & 0x10 == 0 {
        return Ok((Some(sequence), rest));
    }
    let (extension, rest) = rest.split_first_chunk::<4>().ok_or(MpegTsError::Rtp)?;
    let words = usize::from(u16::from_be_bytes([extension[2], extension[3]]));
    Ok((
        Some(sequence),
        rest.get(words * 4..).ok_or(MpegTsError::Rtp)?,
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(pid: u16, counter: u8) -> Vec<u8> {
        let mut packet = vec![0xff; PACKET_LEN];
        packet[0] = SYNC_BYTE;
        packet[1..3].copy_from_slice(&pid.to_be_bytes());
        packet[3] = 0x10 | counter;
        packet
    }

    fn totals(packets: &[Vec<u8>]) -> TransportTotals {
        let mut checker = Checker::default();
        for packet in packets {
            checker.handle_datagram(packet).unwrap();
        }
        checker.totals()
    }

    #[test]
    fn counter_wraps_without_error() {
        let packets: Vec<_> = (0..40).map(|index| packet(256, index % 16)).collect();
        assert_eq!(totals(&packets).continuity_errors, 0);
    }

    #[test]
    fn missing_packet_is_one_error_on_its_pid() {
        let mut checker = Checker::default();
        for (pid, counter) in [(256, 0), (257, 0), (256, 1), (256, 3), (257, 1), (256, 4)] {
            checker.handle_datagram(&packet(pid, counter)).unwrap();
        }
        assert_eq!(
            checker.errors_by_pid().collect::<Vec<_>>(),
            [(256, 1), (257, 0)]
        );
    }

    #[test]
    fn second_repeat_is_an_error_and_the_first_is_not() {
        let once = totals(&[
            packet(256, 0),
            packet(256, 1),
            packet(256, 1),
            packet(256, 2),
        ]);
        assert_eq!((once.duplicates, once.continuity_errors), (1, 0));
        let twice = totals(&[packet(256, 1), packet(256, 1), packet(256, 1)]);
        assert_eq!((twice.duplicates, twice.continuity_errors), (1, 1));
    }

    #[test]
    fn null_and_announced_packets_are_no_errors() {
        let mut announced = packet(256, 9);
        announced[3] |= 0x20;
        announced[4..6].copy_from_slice(&[1, 0x80]);
        let packets = [
            packet(256, 0),
            packet(NULL_PID, 5),
            packet(NULL_PID, 0),
            announced,
        ];
        assert_eq!(totals(&packets).continuity_errors, 0);
    }

    #[test]
    fn null_packets_are_counted_as_a_datagram_each_time() {
        let mut checker = Checker::default();
        for _ in 0..3 {
            checker.handle_datagram(&null_packet().repeat(7)).unwrap();
        }
        let totals = checker.totals();
        assert_eq!((totals.datagrams, totals.packets), (3, 21));
        assert_eq!((totals.continuity_errors, totals.duplicates), (0, 0));
    }

    #[test]
    fn rtp_gap_is_counted_and_the_header_skipped() {
        let mut checker = Checker::default();
        for (sequence, counter) in [(7u16, 0), (8, 1), (11, 2)] {
            let mut datagram = vec![0x80, 33];
            datagram.extend(sequence.to_be_bytes());
            datagram.extend([0; 8]);
            datagram.extend(packet(256, counter));
            checker.handle_datagram(&datagram).unwrap();
        }
        assert_eq!(
            (
                checker.totals().rtp_gaps,
                checker.totals().continuity_errors
            ),
            (1, 0)
        );
    }

    #[test]
    fn cut_datagram_is_refused() {
        let error = Checker::default().handle_datagram(&packet(256, 0)[..187]);
        assert_eq!(error, Err(MpegTsError::Length { length: 187 }));
    }

    proptest! {
        #[test]
        fn any_datagram_is_handled_without_panic(mut bytes: Vec<u8>, packets in 0usize..8) {
            let mut checker = Checker::default();
            let _ = checker.handle_datagram(&bytes);
            bytes.resize(packets * PACKET_LEN, 0x47);
            for packet in bytes.chunks_mut(PACKET_LEN) {
                packet[0] = 0x47;
            }
            let _ = checker.handle_datagram(&bytes);
        }
    }
}
