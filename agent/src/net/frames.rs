//! Framing between agents above TLS: a big-endian `u32` length precedes each frame.
//!
//! The accepting side sends one verdict frame before anything else; for the dialing side the
//! connection is up only after an accepting verdict. In TLS 1.3 the client finishes its handshake
//! before the server has checked the client's certificate. Without the verdict the client could not
//! tell a refusal from a broken connection.
//!
//! # Wire format
//!
//! | offset | length | verdict frame |
//! |---|---|---|
//! | 0 | 1 | 0 accepted, 1 refused, 2 crossed: the accepting side's own dialing goes on |
//! | 1 | rest | reason in UTF-8, at most [`MAX_TEXT_BYTES`] bytes |

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use common::signal::{MAX_FRAME_BYTES, MAX_TEXT_BYTES};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Decoder, Encoder, Framed, LengthDelimitedCodec};

/// A connection as a stream and a sink of frames.
pub(super) type Frames<S> = Framed<S, FrameCodec>;

/// Frames a byte stream. A frame longer than [`MAX_FRAME_BYTES`] ends the stream with an error.
pub(super) fn frames<S: AsyncRead + AsyncWrite>(stream: S) -> Frames<S> {
    let codec = LengthDelimitedCodec::builder()
        .length_field_length(4)
        .max_frame_length(MAX_FRAME_BYTES)
        .new_codec();
    Framed::new(stream, FrameCodec(codec))
}

/// Codec of lengths and frames. The read buffer is released with its frame: a retained buffer would
/// hold twice the longest frame per peer.
#[derive(Debug)]
pub(super) struct FrameCodec(LengthDelimitedCodec);

impl Decoder for FrameCodec {
    type Item = Bytes;
    type Error = io::Error;

    fn decode(&mut self, source: &mut BytesMut) -> io::Result<Option<Bytes>> {
        let frame = self.0.decode(source)?;
        if frame.is_some() {
            *source = BytesMut::from(&source[..]);
        }
        Ok(frame.map(BytesMut::freeze))
    }
}

impl Encoder<Bytes> for FrameCodec {
    type Error = io::Error;

    fn encode(&mut self, frame: Bytes, target: &mut BytesMut) -> io::Result<()> {
        self.0.encode(frame, target)
    }
}

/// The accepting side's verdict about a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The connection is up.
    Accepted,
    /// The connection is refused, for this reason (one sentence for a person).
    Refused(String),
    /// Both sides dialed at once, and the other connection is kept.
    Crossed,
}

impl Verdict {
    /// Encodes the verdict frame, without its length.
    pub(super) fn encode(&self) -> Bytes {
        let (code, reason) = match self {
            Self::Accepted => (0, ""),
            Self::Refused(reason) => (1, reason.as_str()),
            Self::Crossed => (2, ""),
        };
        let end = reason.floor_char_boundary(MAX_TEXT_BYTES);
        let mut bytes = BytesMut::with_capacity(1 + end);
        bytes.put_u8(code);
        bytes.put_slice(reason.get(..end).unwrap_or_default().as_bytes());
        bytes.freeze()
    }

    /// Decodes a verdict frame; `None` if it is malformed.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (code, reason) = bytes.split_first()?;
        if reason.len() > MAX_TEXT_BYTES {
            return None;
        }
        match code {
            0 => Some(Self::Accepted),
            1 => Some(Self::Refused(
                std::str::from_utf8(reason)
                    .ok()?
                    .chars()
                    .filter(|c| !c.is_control())
                    .collect(),
            )),
            2 => Some(Self::Crossed),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn verdicts_survive_the_wire() {
        for verdict in [
            Verdict::Accepted,
            Verdict::Crossed,
            Verdict::Refused("Agent `a` is not admitted here".to_owned()),
        ] {
            assert_eq!(Verdict::decode(&verdict.encode()), Some(verdict));
        }
    }

    #[test]
    fn long_reason_is_cut_at_a_character() {
        let verdict = Verdict::Refused("ü".repeat(MAX_TEXT_BYTES));
        let Some(Verdict::Refused(reason)) = Verdict::decode(&verdict.encode()) else {
            panic!("not a refusal");
        };
        assert_eq!(reason, "ü".repeat(MAX_TEXT_BYTES / 2));
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_or_refused(bytes: Vec<u8>) {
            let _ = Verdict::decode(&bytes);
        }
    }
}
