//! Plausibility check of a relay's announcement. A relay may send only what was requested, in a form
//! that keeps checksums correct.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{ManagedKey, RelayFlow, RelayFlowKey, StreamKey};
use common::relay::{Endpoints, FIRST_PORT, FIRST_RELAY_PORT, is_neutral, to_multicast};
use common::signal::RelayResponse;

use super::Receptions;
use super::session::Place;
use super::sessions::LEASE;
use crate::proto::context::Context;

/// Limit of announced flows per address.
const MAX_ANNOUNCED: usize = 256;

impl Receptions {
    /// Checks a relay's announcement and returns its flows.
    pub(super) fn judge(
        &self,
        cx: &Context,
        key: ManagedKey,
        place: Place,
        response: &RelayResponse,
    ) -> Result<BTreeMap<RelayFlowKey, RelayFlow>, &'static str> {
        let Some(session) = self.session(key, place) else {
            return Err("nothing that was asked for");
        };
        let relay_address = *response.relay_address;
        let relay = Ipv6Addr::from(relay_address);
        if relay.is_multicast() || relay.is_unspecified() || relay.is_loopback() {
            return Err("an address that cannot be its own");
        }
        if response.flows.len() > MAX_ANNOUNCED {
            return Err("more flows than an address may have");
        }
        if Duration::from_millis(response.lease_ms) < LEASE[0] {
            return Err("a lease that is too short");
        }
        let taken: BTreeSet<RelayFlowKey> = self
            .by_address
            .iter()
            .filter(|(other, _)| **other != key)
            .flat_map(|(_, other)| other.session.iter().chain(&other.standby))
            .flat_map(|session| session.flows.keys().copied())
            .collect();
        let mut flows = BTreeMap::new();
        for announced in &response.flows {
            let stream = StreamKey {
                multicast_address: key.multicast_address,
                source: *announced.source,
                source_port: announced.source_port,
                destination_port: announced.destination_port,
                vlan: 0,
                bridge: key.bridge,
            };
            let endpoints = Endpoints {
                relay_address,
                relay_port: announced.relay_port,
                agent_address: cx.config.address.octets(),
                agent_port: announced.agent_port,
            };
            let flow = RelayFlowKey {
                relay_address,
                relay_port: announced.relay_port,
                agent_port: announced.agent_port,
            };
            let source = Ipv6Addr::from(stream.source);
            if flow.relay_port < FIRST_RELAY_PORT || flow.agent_port < FIRST_PORT {
                return Err("a port that is not its to choose");
            }
            if !is_neutral(&stream, &endpoints) {
                return Err("ports that would spoil the checksum");
            }
            if source.is_multicast() || source.is_unspecified() || source.is_loopback() {
                return Err("a source that cannot send");
            }
            if !session.filters.iter().any(|f| f.accepts(&stream.source)) {
                return Err("a source that nobody asked for");
            }
            let address_difference = to_multicast(&stream, &endpoints);
            let value = RelayFlow {
                session: session.transaction,
                stream,
                agent_address: endpoints.agent_address,
                address_difference,
                pad: 0,
            };
            if taken.contains(&flow) || flows.insert(flow, value).is_some() {
                return Err("the same ports twice");
            }
        }
        Ok(flows)
    }
}
