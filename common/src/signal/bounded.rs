//! Lists and texts of messages, bounded where they are read.
//!
//! What is longer is refused at its head, before anything is kept of it: 4 MiB of CBOR would otherwise
//! become many times as much.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;

use minicbor::bytes::ByteVec;
use minicbor::decode::Error;
use minicbor::{Decode, Decoder};

use super::MAX_TEXT_BYTES;

/// Reads a list of `MAX` elements at most. A list whose length is not told first is none of ours.
pub(super) fn list<'b, C, T: Decode<'b, C>, const MAX: usize>(
    decoder: &mut Decoder<'b>,
    context: &mut C,
) -> Result<Vec<T>, Error> {
    let length = length(decoder, MAX)?;
    (0..length).map(|_| decoder.decode_with(context)).collect()
}

/// Reads a list of `MAX` texts at most.
pub(super) fn texts<C, const MAX: usize>(
    decoder: &mut Decoder<'_>,
    context: &mut C,
) -> Result<Vec<String>, Error> {
    let length = length(decoder, MAX)?;
    (0..length).map(|_| text(decoder, context)).collect()
}

fn length(decoder: &mut Decoder<'_>, most: usize) -> Result<usize, Error> {
    decoder
        .array()?
        .and_then(|length| usize::try_from(length).ok())
        .filter(|length| *length <= most)
        .ok_or_else(|| Error::message("a list that is too long"))
}

/// Reads a name or a sentence of [`MAX_TEXT_BYTES`] at most.
pub(super) fn text<C>(decoder: &mut Decoder<'_>, _: &mut C) -> Result<String, Error> {
    let text = decoder.str()?;
    if text.len() > MAX_TEXT_BYTES {
        return Err(Error::message("a text that is too long"));
    }
    Ok(text.to_owned())
}

/// Reads such a text, or null.
pub(super) fn optional_text<C>(
    decoder: &mut Decoder<'_>,
    context: &mut C,
) -> Result<Option<String>, Error> {
    if decoder.datatype()? == minicbor::data::Type::Null {
        decoder.null()?;
        return Ok(None);
    }
    text(decoder, context).map(Some)
}

/// Reads `MAX` bytes at most.
pub(super) fn bytes<C, const MAX: usize>(
    decoder: &mut Decoder<'_>,
    _: &mut C,
) -> Result<ByteVec, Error> {
    let bytes = decoder.bytes()?;
    if bytes.len() > MAX {
        return Err(Error::message("bytes that are too many"));
    }
    Ok(ByteVec::from(bytes.to_vec()))
}
