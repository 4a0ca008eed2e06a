//! Frames of the control channel.
//!
//! The channel is a virtio-serial port: a byte stream that a live migration may cut at any byte.
//! The first part of a frame then arrives on the source's socket and the rest on the destination's.
//! Frames therefore carry a sync word, their length and a CRC. Frames from the guest also carry a
//! number, by which the host requests missing frames again, and the guest's time, because the
//! channel may delay them.
//!
//! # Wire format
//!
//! All integers are little endian.
//!
//! | offset | length | field |
//! |---|---|---|
//! | 0 | 4 | sync word `a7 52 43 4c` |
//! | 4 | 1 | kind of message |
//! | 5 | 4 | number, counted by the guest since its boot; zero from the host |
//! | 9 | 8 | time of the reported event: the guest's monotonic clock, ns; zero from the host |
//! | 17 | 4 | length of the payload, at most 65,536 |
//! | 21 | 4 | CRC-32 (IEEE 802.3) of the bytes 4 to 21 and of the payload |
//! | 25 | .. | payload |

const SYNC: [u8; 4] = [0xa7, b'R', b'C', b'L'];
const HEADER_LEN: usize = 25;

/// Longest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = 65_536;

/// A received frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Kind of message.
    pub kind: u8,
    /// Number that the guest gave the frame.
    pub number: u32,
    /// Time of the reported event, in nanoseconds of the guest's monotonic clock.
    pub guest_ns: u64,
    /// The encoded message.
    pub payload: Vec<u8>,
}

/// Returns a whole frame. `payload` must not be longer than [`MAX_PAYLOAD`].
pub fn frame(kind: u8, number: u32, guest_ns: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + payload.len());
    bytes.extend(SYNC);
    bytes.push(kind);
    bytes.extend(number.to_le_bytes());
    bytes.extend(guest_ns.to_le_bytes());
    bytes.extend(
        u32::try_from(payload.len())
            .unwrap_or(u32::MAX)
            .to_le_bytes(),
    );
    let crc = crc32(&[&bytes[4..], payload]);
    bytes.extend(crc.to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Finds frames in a byte stream, and resynchronizes after damage.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    /// Bytes that belonged to no whole frame.
    pub skipped: u64,
}

impl Decoder {
    /// Adds bytes from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next whole frame, or `None` when more bytes are needed.
    pub fn poll_frame(&mut self) -> Option<Frame> {
        loop {
            let start = self.find_sync();
            self.skipped += start as u64;
            self.buffer.drain(..start);
            match parse(&self.buffer) {
                Parsed::Whole(frame) => {
                    self.buffer.drain(..HEADER_LEN + frame.payload.len());
                    return Some(frame);
                }
                Parsed::Short => return None,
                // Only one byte is dropped, because a whole frame may begin within the damaged
                // frame.
                Parsed::Damaged => {
                    self.skipped += 1;
                    self.buffer.drain(..1);
                }
            }
        }
    }

    /// Returns the start of the next sync word, or of a possible sync word that the buffer's end
    /// cuts.
    fn find_sync(&self) -> usize {
        let is_start = |start: &usize| {
            self.buffer[*start..]
                .iter()
                .zip(SYNC)
                .all(|(byte, sync)| *byte == sync)
        };
        (0..self.buffer.len())
            .find(is_start)
            .unwrap_or(self.buffer.len())
    }
}

enum Parsed {
    Whole(Frame),
    Short,
    Damaged,
}

fn parse(bytes: &[u8]) -> Parsed {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Parsed::Short;
    };
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let length = word(17) as usize;
    if length > MAX_PAYLOAD {
        return Parsed::Damaged;
    }
    let Some(payload) = rest.get(..length) else {
        return Parsed::Short;
    };
    if crc32(&[&header[4..21], payload]) != word(21) {
        return Parsed::Damaged;
    }
    Parsed::Whole(Frame {
        kind: header[4],
        number: word(5),
        guest_ns: u64::from(word(9)) | u64::from(word(13)) << 32,
        payload: payload.to_vec(),
    })
}

/// Returns the CRC-32 of IEEE 802.3 over several slices.
pub(crate) fn crc32(slices: &[&[u8]]) -> u32 {
    let bytes = slices.iter().flat_map(|slice| slice.iter());
    !bytes.fold(u32::MAX, |crc, byte| {
        CRC_TABLE[usize::from(crc as u8 ^ byte)] ^ (crc >> 8)
    })
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                0xedb8_8320 ^ (crc >> 1)
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
};
