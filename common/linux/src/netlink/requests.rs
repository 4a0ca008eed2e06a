//! Requests and dumps; the kernel answers within the call.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::bytes::{Message, acknowledgement, messages, set_length, set_sequence};
use super::refusal::{Refusal, RequestError};

/// Message type at the end of a dump (`NLMSG_DONE`).
const NLMSG_DONE: u16 = 3;
/// Requests per datagram. The kernel processes a datagram of many requests in one call; this bound
/// keeps the acknowledgements within the socket's receive buffer.
const BATCH: usize = 64;

/// Socket for requests.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The error of `socket(2)` or `bind(2)`.
    pub fn open() -> io::Result<Self> {
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

    /// Sends a dump request and returns the messages of the answer that the crate can parse.
    ///
    /// # Errors
    ///
    /// The error of the socket, or of the kernel for the request.
    pub fn dump(&mut self, request: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut answers = Vec::new();
        self.dump_messages(serialized(request, NLM_F_DUMP), |message| {
            // A link of a kind unknown to the parser must not hide the others.
            match typed(message.bytes) {
                Some(answer) => answers.push(answer),
                None => tracing::debug!(kind = message.kind, "netlink message not understood"),
            }
        })?;
        Ok(answers)
    }

    /// Sends a complete dump request (`NLM_F_DUMP`) and passes each message of the answer to the
    /// callback. For messages that the typed parser may not know.
    ///
    /// # Errors
    ///
    /// The error of the socket, or of the kernel for the request.
    pub fn dump_messages(
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

    /// Sends a request that has a single message as its answer, and returns that message.
    ///
    /// # Errors
    ///
    /// See [`RequestError`].
    pub fn get(
        &mut self,
        request: RouteNetlinkMessage,
    ) -> Result<RouteNetlinkMessage, RequestError> {
        let mut request = serialized(request, 0);
        self.number(&mut request);
        self.socket.send(&request, 0)?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in messages(&datagram) {
                if message.sequence != self.sequence {
                    continue;
                }
                if let Some(Err(refusal)) = acknowledgement(&message) {
                    return Err(refusal.into());
                }
                return typed(message.bytes).ok_or(RequestError::Answer);
            }
        }
    }

    /// Sends a change request. `flags` are added to `NLM_F_REQUEST` and `NLM_F_ACK`.
    ///
    /// # Errors
    ///
    /// [`RequestError::Socket`], [`RequestError::Refused`].
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), RequestError> {
        let outcomes = self.apply(&mut [serialized(message, NLM_F_ACK | flags)])?;
        Ok(outcomes.into_iter().collect::<Result<(), Refusal>>()?)
    }

    /// Sends complete requests including `struct nlmsghdr`, each with `NLM_F_ACK`, and returns the
    /// outcome of each in order. Fills in lengths and sequence numbers.
    ///
    /// # Errors
    ///
    /// The error of the socket. A refused request is an element of the result.
    pub fn apply(&mut self, requests: &mut [Vec<u8>]) -> io::Result<Vec<Result<(), Refusal>>> {
        let mut outcomes = Vec::with_capacity(requests.len());
        for batch in requests.chunks_mut(BATCH) {
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

    /// Fills in the request's length and the next sequence number.
    fn number(&mut self, request: &mut [u8]) {
        self.sequence = self.sequence.wrapping_add(1);
        set_length(request);
        set_sequence(request, self.sequence);
    }
}

/// Serializes a typed message as a request with flags; the sequence number is filled in on sending.
pub fn serialized(message: RouteNetlinkMessage, flags: u16) -> Vec<u8> {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// Parses one message; `None` if the crate does not know or cannot parse it.
pub fn typed(message: &[u8]) -> Option<RouteNetlinkMessage> {
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) {
        Ok(NetlinkMessage {
            payload: NetlinkPayload::InnerMessage(message),
            ..
        }) => Some(message),
        _ => None,
    }
}
