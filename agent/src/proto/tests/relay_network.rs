//! Network of the simulated relays: the source, `uplink` on the host, and the relays.

use std::time::Duration;

use common::maps::{CopyCounts, Origin, Origins, RelayFlowKey, StreamKey};
use common::relay::{COPY_LIFETIME_NS, count_copy, port_pairs};
use common::signal::{AnnouncedFlow, PeerMessage, Reason, RelayRelease, RelayResponse};

use super::relay_world::{Event, SIGNALLING_DELAY, World, relay_address, stream_key};
use crate::proto::*;

const LEASE: Duration = Duration::from_secs(30);

impl World {
    pub(super) fn emit(&mut self) {
        self.after(self.interval, Event::Emit);
        if !self.sends {
            return;
        }
        self.sent += 1;
        let sequence = self.sent;
        self.delivered.insert(sequence, 0);
        self.kernel.copies.remove(&sequence.saturating_sub(5000));
        if self.native {
            self.after(self.native_delay, Event::Native { sequence });
        }
        for number in 0..self.relays.len() {
            let relay = &self.relays[number];
            let leased = relay.transaction.is_some() && self.now < relay.lease_end;
            if relay.sends && relay.receives && leased {
                let (key, delay) = (relay.key, relay.delay);
                self.after(delay, Event::Relayed { key, sequence });
            }
        }
    }

    /// Plays `uplink` for a packet.
    pub(super) fn packet(&mut self, flow: StreamKey, origin: Origin, sequence: u64) {
        let now = self.now;
        let Some((since, origins)) = self.kernel.managed.get(&flow.managed()).copied() else {
            return;
        };
        let stream = self.kernel.streams.entry(flow).or_default();
        let usage = match origin {
            Origin::Native => &mut stream.native,
            Origin::Relay => &mut stream.relay,
        };
        usage.packets += 1;
        let before = std::mem::replace(&mut usage.last_ns, now.0);
        if before != 0 {
            let gap = now.0 - before;
            let average = usage.interarrival_ns;
            usage.interarrival_ns = if average == 0 {
                gap
            } else {
                average - average / 8 + gap / 8
            };
        }
        if before == 0 || before < since.0 {
            let event = DatapathEvent::FirstPacket {
                key: flow,
                origin,
                at: now,
            };
            let late = Duration::from_micros(100 + self.dice.roll(2000));
            self.after(late, Event::Datapath(event));
        }
        let bit = match origin {
            Origin::Native => Origins::PASS_NATIVE,
            Origin::Relay => Origins::PASS_RELAY,
        };
        let passes = if origins as u8 & Origins::FINGERPRINT != 0 {
            let (last, copies) = self.kernel.copies.entry(sequence).or_default();
            if now.0 - *last > COPY_LIFETIME_NS {
                *copies = CopyCounts::default();
            }
            *last = now.0;
            let (counts, passes) = count_copy(*copies, origin, origins as u8);
            *copies = counts;
            passes
        } else {
            origins as u8 & bit != 0
        };
        if passes && let Some(times) = self.delivered.get_mut(&sequence) {
            *times += 1;
        }
    }

    pub(super) fn relay_hears(&mut self, number: usize, bytes: &[u8]) {
        let now = self.now;
        let relay = &mut self.relays[number];
        if !relay.connected || !relay.runs {
            return;
        }
        let (transaction, message) = PeerMessage::decode(bytes).unwrap();
        match message {
            PeerMessage::RelayRequest(_) if relay.refuses => {
                relay.requests.push(transaction);
                let reason = "This agent may have 0 addresses".to_owned();
                self.answer(
                    number,
                    transaction,
                    RelayRelease(Reason::unspecified(reason)).into(),
                );
            }
            PeerMessage::RelayRequest(request) => {
                relay.requests.push(transaction);
                relay.asked_for = request.sources.iter().map(|source| **source).collect();
                relay.transaction = Some(transaction);
                relay.lease_end = now + LEASE;
                let key = relay.key;
                let stream = stream_key();
                let mut response = RelayResponse {
                    relay_address: key.relay_address.into(),
                    lease_ms: 30_000,
                    flows: vec![AnnouncedFlow {
                        source: stream.source.into(),
                        source_port: stream.source_port,
                        destination_port: stream.destination_port,
                        relay_port: key.relay_port,
                        agent_port: key.agent_port,
                    }],
                };
                if let Some(lie) = relay.lie {
                    lie(&mut response);
                }
                self.answer(number, transaction, response.into());
            }
            PeerMessage::RelayRelease(_) => {
                relay.released.push(transaction);
                if relay.transaction == Some(transaction) {
                    relay.transaction = None;
                }
            }
            other => panic!("a relay is told {other:?}"),
        }
    }

    pub(super) fn answer(&mut self, relay: usize, transaction: u64, message: PeerMessage) {
        let bytes = message.encode(transaction);
        self.after(SIGNALLING_DELAY, Event::ToAgent { relay, bytes });
    }
}

pub(super) fn flow_key(relay: usize, config: &AgentConfig) -> RelayFlowKey {
    let (stream, relay_address) = (stream_key(), relay_address(relay));
    let agent_address = config.address.octets();
    let (relay_port, agent_port) = port_pairs(&stream, &relay_address, &agent_address)
        .next()
        .unwrap();
    RelayFlowKey {
        relay_address,
        relay_port,
        agent_port,
    }
}
