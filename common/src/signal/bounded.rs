//! Decoders for lists and texts with a limit.
//!
//! A decoder refuses a longer list or text at its header, before it stores anything: 4 MiB of CBOR
//! would otherwise take many times the memory.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;

use minicbor::bytes::ByteVec;
use minicbor::decode::Error;
use minicbor::{Decode, Decoder};

use super::MAX_TEXT_BYTES;

/// Decodes a list of at most `MAX` elements. Refuses a list of indefinite length, which no sender
/// of ours encodes.
pub(super) fn list<'b, C, T: Decode<'b, C>, const MAX: usize>(
    decoder: &mut Decoder<'b>,
    context: &mut C,
) -> Result<Vec<T>, Error> {
    let length = length(decoder, MAX)?;
    (0..length).map(|_| decoder.decode_with(context)).collect()
}

/// Decodes a list of at most `MAX` texts.
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

/// Decodes a name or a sentence of at most [`MAX_TEXT_BYTES`] bytes.
pub(super) fn text<C>(decoder: &mut Decoder<'_>, _: &mut C) -> Result<String, Error> {
    let text = decoder.str()?;
    if text.len() > MAX_TEXT_BYTES {
        return Err(Error::message("a text that is too long"));
    }
    Ok(text.to_owned())
}

/// Decodes a text as [`text`] does, or null.
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

/// Decodes at most `MAX` bytes.
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
