//! Messages from and to agents.

use std::net::Ipv6Addr;

use common::signal::{
    AnnouncedFlow, Code, DecodeError, ErrorMessage, MigrationAbort, PeerMessage, Reason,
    RelayRelease, RelayRequest, RelayResponse,
};
use tracing::{debug, info, warn};

use super::{RelayOutput, RelayServer};
use crate::proto::refusal::bounded;

impl RelayServer {
    pub(super) fn on_frame(&mut self, peer: &str, bytes: &[u8]) {
        let (transaction, message) = match PeerMessage::decode(bytes) {
            Ok(decoded) => decoded,
            Err(error) => {
                self.counters.malformed_frames += 1;
                warn!(peer, %error, "Frame is not understood");
                if let DecodeError::Version { transaction, .. }
                | DecodeError::UnknownKind { transaction, .. }
                | DecodeError::Text { transaction } = error
                {
                    let reason = Reason::from(&error);
                    self.send(peer, transaction, &ErrorMessage(reason).into());
                }
                return;
            }
        };
        match message {
            PeerMessage::RelayRequest(body) => self.on_request(peer, transaction, &body),
            PeerMessage::RelayRelease(RelayRelease(reason)) => {
                self.on_release(peer, transaction, &reason.text);
            }
            PeerMessage::AgentRequest(_) => {
                self.counters.malformed_frames += 1;
                let reason = format!("{} is a relay, not an agent", self.config.name);
                let reason = Reason::new(Code::UNSUPPORTED, reason);
                self.send(peer, transaction, &MigrationAbort(reason).into());
            }
            PeerMessage::AgentResponse(_)
            | PeerMessage::RelayResponse(_)
            | PeerMessage::MigrationProgress(_)
            | PeerMessage::HandoverCut(_)
            | PeerMessage::ArrivalNotice(_)
            | PeerMessage::AddressClaim(_)
            | PeerMessage::AddressClaimReply(_)
            | PeerMessage::MigrationAbort(_) => self.counters.malformed_frames += 1,
            PeerMessage::Error(ErrorMessage(reason)) => {
                debug!(
                    peer,
                    transaction,
                    reason = bounded(&reason.text),
                    "Agent did not understand"
                );
            }
        }
    }

    fn on_request(&mut self, peer: &str, transaction: u64, request: &RelayRequest) {
        if let Err(refusal) = self.request(peer, transaction, request) {
            self.counters.refused_requests += 1;
            let multicast_address = Ipv6Addr::from(*request.multicast_address);
            info!(agent = peer, %multicast_address, %refusal, "Request refused");
            self.send(peer, transaction, &RelayRelease(refusal.reason()).into());
        }
    }

    fn on_release(&mut self, peer: &str, transaction: u64, reason: &str) {
        let number = self.of_agent(peer).find(|number| {
            self.sessions
                .get(number)
                .and_then(|session| session.owner.as_ref())
                .is_some_and(|owner| owner.transaction == transaction)
        });
        if let Some(number) = number {
            info!(agent = peer, reason = bounded(reason), "Session released");
            self.remove(number);
        }
    }

    /// Sends the complete list of a session's flows to its agent, unless the agent's next hop is still
    /// being resolved.
    pub(super) fn announce(&mut self, number: u64) {
        let Some(session) = self.sessions.get(&number) else {
            return;
        };
        let Some(owner) = &session.owner else {
            return;
        };
        if session.resolving {
            return;
        }
        let response = RelayResponse {
            relay_address: self.config.address.octets().into(),
            lease_ms: u64::try_from(self.config.lease.as_millis()).unwrap_or(u64::MAX),
            flows: session
                .flows
                .iter()
                .map(|(stream, flow)| AnnouncedFlow {
                    source: stream.source.into(),
                    source_port: stream.source_port,
                    destination_port: stream.destination_port,
                    relay_port: flow.ports.relay,
                    agent_port: flow.ports.agent,
                })
                .collect(),
        };
        let (agent, transaction) = (owner.agent.clone(), owner.transaction);
        self.send(&agent, transaction, &response.into());
    }

    pub(super) fn send(&mut self, peer: &str, transaction: u64, message: &PeerMessage) {
        if self.connected.contains_key(peer) {
            self.outputs.push_back(RelayOutput::Frame {
                peer: peer.to_owned(),
                bytes: message.encode(transaction),
            });
        }
    }
}
