//! A mapping server as nodes observe it.

use common::mat::message::*;
use common::mat::seal::{Sealed, seal};

use super::*;
use crate::node::core::*;

impl World {
    /// Returns a node with the key generation at the servers.
    pub(in crate::node::core::tests) fn party(&self, hoa: Ipv6Addr) -> Party {
        party(&self.nodes, hoa)
    }

    pub(super) fn serve(&mut self, index: usize, datagram: &Datagram) {
        let server = &mut self.servers[index];
        let Ok(sealed) = Sealed::parse(&datagram.bytes) else {
            return;
        };
        if server.down || sealed.keying != Keying::Node {
            return;
        }
        let sender = party(&self.nodes, sealed.hoa.into());
        let key = self.secret.node(sender.hoa, sender.generation);
        let Ok(bytes) = sealed.open(&key) else {
            return;
        };
        let hoa = Ipv6Addr::from(sealed.hoa);
        let (transaction, message) = MatMessage::decode(&bytes).unwrap();
        let now_ms = EPOCH_MS + server.skew_ms + self.now.as_millis() as u64;
        let answer: MatMessage = match message {
            MatMessage::UpdateRequest(update) => {
                server.updates += 1;
                let known = server.mappings.get(&hoa);
                let sequence = known.map_or(0, |it| it.0);
                let mut addresses = update.moas.iter().map(|it| (*it.address).into());
                let is_taken = addresses.any(|it: Ipv6Addr| server.squatted.contains(&it));
                let same = known.is_some_and(|it| it.0 == update.sequence && it.1 == update.moas);
                let outcome = match server.refuse {
                    Some(outcome) => outcome,
                    None if is_taken => Outcome::BadAddresses,
                    None if same => Outcome::Accepted,
                    None if update.sequence <= sequence => Outcome::OldSequence,
                    None if update.time_ms.abs_diff(now_ms) > 30_000 => Outcome::WrongTime,
                    None => Outcome::Accepted,
                };
                let lifetime = if outcome == Outcome::Accepted {
                    update.lifetime_s
                } else {
                    0
                };
                let until = self.now + Duration::from_secs(lifetime.into());
                if outcome == Outcome::Accepted {
                    server
                        .mappings
                        .insert(hoa, (update.sequence, update.moas, until));
                }
                UpdateReply {
                    outcome: outcome as u8,
                    sequence: server.mappings.get(&hoa).map_or(0, |it| it.0),
                    time_ms: now_ms,
                    lifetime_s: lifetime,
                }
                .into()
            }
            MatMessage::LookupRequest(lookup) => {
                server.lookups += 1;
                let wanted = Ipv6Addr::from(*lookup.hoa);
                let known = server.mappings.get(&wanted).filter(|it| it.2 > self.now);
                LookupReply {
                    hoa: lookup.hoa,
                    mapping: known.map(|(sequence, moas, _)| Mapping {
                        sequence: *sequence,
                        moas: moas.clone(),
                    }),
                    pair_key: self
                        .secret
                        .pair(sender, party(&self.nodes, wanted))
                        .0
                        .into(),
                    lifetime_s: if known.is_some() { 30 } else { 5 },
                }
                .into()
            }
            _ => return,
        };
        let bytes = seal(
            Keying::Node,
            sealed.hoa,
            &key,
            nonce(self.number),
            &answer.encode(transaction),
        );
        let datagram = Datagram {
            from: datagram.to,
            to: datagram.from,
            bytes,
        };
        self.record.push(datagram.clone());
        self.send(datagram);
    }
}

fn party(nodes: &[Node], hoa: Ipv6Addr) -> Party {
    let mut nodes = (0..).zip(nodes);
    let found = nodes.find(|(index, _)| super::hoa(*index) == hoa);
    Party {
        hoa: hoa.octets(),
        generation: found.map_or(0, |(_, node)| node.generation),
    }
}
