//! Netlink messages as bytes: headers, attributes, acknowledgements.

use std::io;

use super::refusal::Refusal;

/// Length of `struct nlmsghdr`, bytes.
pub const HEADER_BYTES: usize = 16;
/// Attribute of an acknowledgement with the kernel's error text (`NLMSGERR_ATTR_MSG`).
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Flag: the acknowledgement has attributes (`NLM_F_ACK_TLVS`).
const NLM_F_ACK_TLVS: u16 = 0x200;
/// Flag: the acknowledgement repeats only the header of the request (`NLM_F_CAPPED`).
const NLM_F_CAPPED: u16 = 0x100;
/// Message type of an acknowledgement (`NLMSG_ERROR`).
const NLMSG_ERROR: u16 = 2;

/// Iterates over the attributes as (type without flags, value). Stops at the first impossible
/// length.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const NLA_TYPE_MASK: u16 = 0x3fff;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(field(rest, 0)?));
        let kind = u16::from_ne_bytes(field(rest, 2)?) & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Iterates over the values of the attributes of one type. Stops at the first impossible length.
pub fn values(bytes: &[u8], kind: u16) -> impl Iterator<Item = &[u8]> {
    attributes(bytes).filter_map(move |(found, value)| (found == kind).then_some(value))
}

/// One message of a datagram.
pub struct Message<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`.
    pub sequence: u32,
    /// The whole message including its header.
    pub bytes: &'a [u8],
}

/// Splits a datagram into messages. Stops at the first impossible length.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(field(rest, 0)?)).ok()?;
        if length < HEADER_BYTES {
            return None;
        }
        let bytes = rest.get(..length)?;
        let message = Message {
            kind: u16::from_ne_bytes(field(bytes, 4)?),
            flags: u16::from_ne_bytes(field(bytes, 6)?),
            sequence: u32::from_ne_bytes(field(bytes, 8)?),
            bytes,
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Decodes an acknowledgement (`struct nlmsgerr`); `None` for any other message.
pub(super) fn acknowledgement(message: &Message<'_>) -> Option<Result<(), Refusal>> {
    if message.kind != NLMSG_ERROR {
        return None;
    }
    let code = i32::from_ne_bytes(field(message.bytes, HEADER_BYTES)?);
    if code == 0 {
        return Some(Ok(()));
    }
    let echoed = u32::from_ne_bytes(field(message.bytes, HEADER_BYTES + 4)?);
    let echoed = if message.flags & NLM_F_CAPPED != 0 {
        HEADER_BYTES
    } else {
        usize::try_from(echoed).unwrap_or(usize::MAX)
    };
    let attributes = if message.flags & NLM_F_ACK_TLVS != 0 {
        (HEADER_BYTES + 4)
            .checked_add(echoed)
            .map(|offset| offset.next_multiple_of(4))
            .and_then(|offset| message.bytes.get(offset..))
            .unwrap_or_default()
    } else {
        &[]
    };
    let text = values(attributes, NLMSGERR_ATTR_MSG).next().map(|text| {
        String::from_utf8_lossy(text)
            .trim_end_matches('\0')
            .to_owned()
    });
    Some(Err(Refusal {
        error: io::Error::from_raw_os_error(code.saturating_neg()),
        text,
    }))
}

/// Bytes of a request under construction.
pub struct RequestBytes(Vec<u8>);

impl RequestBytes {
    /// Starts a request with type and flags; the sequence number is filled in on sending.
    pub fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        put(&mut bytes, 4, &kind.to_ne_bytes());
        put(&mut bytes, 6, &flags.to_ne_bytes());
        Self(bytes)
    }

    /// Appends bytes, padded to a multiple of four.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Appends one attribute of this type.
    pub fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.push(value);
    }

    /// Appends an attribute whose value is the attributes that `fill` appends.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        const NLA_F_NESTED: u16 = 1 << 15;
        let start = self.0.len();
        self.attribute(kind | NLA_F_NESTED, &[]);
        fill(self);
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        put(&mut self.0, start, &length.to_ne_bytes());
    }

    /// Fills in the length and returns the request.
    pub fn finish(mut self) -> Vec<u8> {
        set_length(&mut self.0);
        self.0
    }
}

/// Fills in `nlmsg_len` of the header.
pub(super) fn set_length(message: &mut [u8]) {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    put(message, 0, &length.to_ne_bytes());
}

/// Fills in `nlmsg_seq` of the header.
pub(super) fn set_sequence(message: &mut [u8], sequence: u32) {
    put(message, 8, &sequence.to_ne_bytes());
}

fn put(bytes: &mut [u8], offset: usize, value: &[u8]) {
    if let Some(target) = bytes.get_mut(offset..offset + value.len()) {
        target.copy_from_slice(value);
    }
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes
        .get(offset..offset.checked_add(N)?)
        .and_then(|bytes| bytes.try_into().ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nested_attributes_have_their_length_with_padding() {
        let mut request = RequestBytes::new(84, 5);
        request.nest(2, |request| request.attribute(1, &[1, 2, 3]));
        let bytes = request.finish();
        assert_eq!(
            bytes.get(16..),
            Some(&[12, 0, 2, 0x80, 7, 0, 1, 0, 1, 2, 3, 0][..])
        );
    }

    #[test]
    fn attribute_is_found_behind_others_of_odd_length() {
        let mut message = RequestBytes::new(92, 0);
        message.push(&[0; 12]);
        message.attribute(7, &[1, 2, 3]);
        message.attribute(1, &[4, 5, 6, 7]);
        let message = message.finish();
        let attributes = &message[HEADER_BYTES + 12..];
        assert_eq!(values(attributes, 1).next(), Some(&[4, 5, 6, 7][..]));
        assert_eq!(values(attributes, 9).next(), None);
    }

    #[test]
    fn attribute_is_found_in_another() {
        let mut message = RequestBytes::new(0, 0);
        message.attribute(1, b"tun\0");
        message.nest(2, |message| message.attribute(8, &[3, 0, 0, 0]));
        let message = message.finish();
        let found = values(&message[HEADER_BYTES..], 2).next().unwrap();
        assert_eq!(values(found, 8).next(), Some(&[3, 0, 0, 0][..]));
        assert_eq!(values(found, 7).next(), None);
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..128)) {
            let _ = values(&bytes, 1).flat_map(|value| values(value, 1)).count();
        }

        #[test]
        fn any_datagram_is_split_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            for message in messages(&bytes) {
                let _ = acknowledgement(&message);
            }
        }

        #[test]
        fn any_acknowledgement_is_read_without_panic(
            flags: u16, body in prop::collection::vec(any::<u8>(), 0..128),
        ) {
            let mut bytes = RequestBytes::new(NLMSG_ERROR, flags);
            bytes.push(&body);
            let bytes = bytes.finish();
            for message in messages(&bytes) {
                let _ = acknowledgement(&message);
            }
        }
    }
}
