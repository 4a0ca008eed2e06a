//! Blocking rtnetlink requests and dumps (RFC 3549), answered by the kernel within the call.

use std::io;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Bytes of `struct nlmsghdr`.
pub(super) const HEADER_BYTES: usize = 16;
/// Attribute of an acknowledgement that holds the kernel's own words (`NLMSGERR_ATTR_MSG`).
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Flag of an acknowledgement that has attributes (`NLM_F_ACK_TLVS`).
const NLM_F_ACK_TLVS: u16 = 0x200;
/// Flag of an acknowledgement that repeats only the header of the request (`NLM_F_CAPPED`).
const NLM_F_CAPPED: u16 = 0x100;
/// Type of an acknowledgement (`NLMSG_ERROR`).
const NLMSG_ERROR: u16 = 2;
/// Type of the end of a dump (`NLMSG_DONE`).
const NLMSG_DONE: u16 = 3;

/// The kernel's refusal of one request.
#[derive(Debug, thiserror::Error)]
#[error("{}", self.sentence())]
pub struct Refusal {
    /// The error number.
    pub error: io::Error,
    /// The kernel's own words, where it has some.
    pub text: Option<String>,
}

impl Refusal {
    fn sentence(&self) -> String {
        match &self.text {
            Some(text) => format!("{text} ({})", self.error),
            None => self.error.to_string(),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, text: None }
    }
}

/// A request socket.
pub(super) struct Requests {
    socket: Socket,
    sequence: u32,
}

impl Requests {
    /// Opens the socket in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// What `socket(2)` and `bind(2)` say.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends a dump request and returns everything the kernel answers.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub(super) fn dump(
        &mut self,
        request: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut answers = Vec::new();
        self.dump_messages(serialized(request, NLM_F_DUMP), |message| {
            match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message.bytes) {
                Ok(NetlinkMessage {
                    payload: NetlinkPayload::InnerMessage(inner),
                    ..
                }) => answers.push(inner),
                Ok(_) => {}
                // One link of a kind that the parser does not know must not hide the others.
                Err(_) => tracing::debug!(kind = message.kind, "netlink message not understood"),
            }
        })?;
        Ok(answers)
    }

    /// Sends a complete dump request (`NLM_F_DUMP`) and passes every message of the answer on, for
    /// callers that read messages which the typed parser may not know.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub(super) fn dump_messages(
        &mut self,
        mut request: Vec<u8>,
        mut visit: impl FnMut(&Message<'_>),
    ) -> io::Result<()> {
        self.number(&mut request);
        self.socket.send(&request, 0)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in messages(&datagram) {
                if message.sequence != self.sequence {
                    continue;
                }
                if message.kind == NLMSG_DONE {
                    return Ok(());
                }
                match acknowledgement(&message) {
                    Some(Err(refusal)) => return Err(refusal.error),
                    Some(Ok(())) => {}
                    None => visit(&message),
                }
            }
        }
    }

    /// Sends one complete request, `struct nlmsghdr` included, that is answered by one message, and
    /// returns that with its header. Length and sequence number are filled in here.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub(super) fn get(&mut self, mut request: Vec<u8>) -> io::Result<Result<Vec<u8>, Refusal>> {
        self.number(&mut request);
        self.socket.send(&request, 0)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in messages(&datagram) {
                if message.sequence != self.sequence {
                    continue;
                }
                return Ok(match acknowledgement(&message) {
                    Some(Err(refusal)) => Err(refusal),
                    Some(Ok(())) | None => Ok(message.bytes.to_vec()),
                });
            }
        }
    }

    /// Sends complete requests, `struct nlmsghdr` included, that each ask for an acknowledgement
    /// (`NLM_F_ACK`), and returns the outcome of each in order. Lengths and sequence numbers are
    /// filled in here.
    ///
    /// # Errors
    ///
    /// What the socket says; a refused request is an element of the result.
    pub(super) fn apply(
        &mut self,
        requests: &mut [Vec<u8>],
    ) -> io::Result<Vec<Result<(), Refusal>>> {
        let mut outcomes = Vec::with_capacity(requests.len());
        // The kernel takes a datagram of many requests in one go; the bound keeps the
        // acknowledgements within the socket's receive buffer.
        for batch in requests.chunks_mut(64) {
            let first = self.sequence.wrapping_add(1);
            let mut datagram = Vec::new();
            for request in batch.iter_mut() {
                self.number(request);
                datagram.extend_from_slice(request);
                datagram.resize(datagram.len().next_multiple_of(4), 0);
            }
            self.socket.send(&datagram, 0)?;
            let mut batch_outcomes: Vec<Option<Result<(), Refusal>>> =
                batch.iter().map(|_| None).collect();
            let mut missing = batch.len();
            while missing > 0 {
                let (datagram, _) = self.socket.recv_from_full()?;
                for message in messages(&datagram) {
                    let index = message.sequence.wrapping_sub(first) as usize;
                    if let Some(slot @ None) = batch_outcomes.get_mut(index)
                        && let Some(outcome) = acknowledgement(&message)
                    {
                        *slot = Some(outcome);
                        missing -= 1;
                    }
                }
            }
            outcomes.extend(batch_outcomes.into_iter().flatten());
        }
        Ok(outcomes)
    }

    /// Fills in a request's length and the next sequence number.
    fn number(&mut self, request: &mut [u8]) {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(request.len()).unwrap_or(u32::MAX);
        put(request, 0, &length.to_ne_bytes());
        put(request, 8, &self.sequence.to_ne_bytes());
    }
}

/// The values of the attributes of one kind, up to one whose length is impossible.
pub(super) fn values(attributes: &[u8], kind: u16) -> impl Iterator<Item = &[u8]> {
    const NLA_TYPE_MASK: u16 = 0x3fff;
    let mut rest = attributes;
    let all = std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(field(rest, 0)?));
        let found = u16::from_ne_bytes(field(rest, 2)?) & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((found, value))
    });
    all.filter_map(move |(found, value)| (found == kind).then_some(value))
}

/// A typed message as a complete request with flags; length and sequence number follow on sending.
pub(super) fn serialized(message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// One message within a datagram.
pub(super) struct Message<'a> {
    /// `nlmsg_type`.
    pub(super) kind: u16,
    /// `nlmsg_flags`.
    pub(super) flags: u16,
    /// `nlmsg_seq`.
    pub(super) sequence: u32,
    /// The whole message with its header.
    pub(super) bytes: &'a [u8],
}

/// Splits a datagram into its messages; stops at the first one whose length is impossible.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
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

/// Reads an acknowledgement (`struct nlmsgerr`); `None` for any other message.
fn acknowledgement(message: &Message<'_>) -> Option<Result<(), Refusal>> {
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
pub(super) struct RequestBytes(Vec<u8>);

impl RequestBytes {
    /// Starts a request of a kind with flags; length and sequence number follow on sending.
    pub(super) fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; HEADER_BYTES];
        put(&mut bytes, 4, &kind.to_ne_bytes());
        put(&mut bytes, 6, &flags.to_ne_bytes());
        Self(bytes)
    }

    /// Appends bytes, padded to four.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    /// Appends an attribute.
    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.push(value);
    }

    /// Appends an attribute whose value is the attributes that `fill` appends.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        const NLA_F_NESTED: u16 = 1 << 15;
        let start = self.0.len();
        self.attribute(kind | NLA_F_NESTED, &[]);
        fill(self);
        let length = u16::try_from(self.0.len() - start).unwrap_or(u16::MAX);
        put(&mut self.0, start, &length.to_ne_bytes());
    }

    /// The request.
    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }
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

    proptest! {
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
            let mut bytes = bytes.finish();
            let length = u32::try_from(bytes.len()).unwrap_or(0);
            put(&mut bytes, 0, &length.to_ne_bytes());
            for message in messages(&bytes) {
                let _ = acknowledgement(&message);
            }
        }
    }
}
