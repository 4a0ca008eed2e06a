//! `AgentRequest`: the addresses to which a departing domain listens, with their flows.

use std::collections::{BTreeMap, BTreeSet};

use common::group;
use common::maps::{ManagedKey, StreamKey};
use common::signal::{self, AgentRequest, Flow, MAX_FLOWS, MAX_LISTENERS, MAX_NICS, MAX_SOURCES};

use super::{Around, Order, Requester};
use crate::proto::filter::Filter;
use crate::proto::host::inventory::Inventory;
use crate::proto::host::listeners::{ListenerView, Mirror};
use crate::proto::{DomainUuid, Mac, Stream, Timestamp, millis};

/// MLD version in the request for a listener that has not reported on this host.
const MLD_VERSION: u8 = 2;

/// Returns the listeners of all NICs of a domain with the NIC's MAC, without addresses that have no
/// meaning on another link.
pub(super) fn departing_listeners<'a>(
    inventory: &Inventory,
    mirror: &'a Mirror,
    uuid: &DomainUuid,
) -> impl Iterator<Item = (ListenerView<'a>, Mac)> + use<'a> {
    inventory
        .ports_of_domain(uuid)
        .into_iter()
        .flat_map(|(ifindex, mac)| {
            mirror
                .of_port(ifindex)
                .filter(|view| group::is_routable(&view.key.multicast_address))
                .map(move |view| (view, mac))
        })
}

/// Makes the request for a domain, with the flows that the kernel knows.
pub(super) fn agent_request(
    order: &Order,
    now: Timestamp,
    around: &Around<'_>,
    streams: &[(StreamKey, Stream)],
) -> AgentRequest {
    let mut flows: BTreeMap<ManagedKey, Vec<&(StreamKey, Stream)>> = BTreeMap::new();
    for stream in streams {
        flows.entry(stream.0.managed()).or_default().push(stream);
    }
    let listener = |key: ManagedKey, mac: Mac, filter: &Filter, mld_version| signal::Listener {
        vlan: key.vlan,
        multicast_address: key.multicast_address.into(),
        filter_mode: filter.mode as u8,
        sources: filter
            .sources
            .iter()
            .take(MAX_SOURCES)
            .map(|source| source.octets().into())
            .collect(),
        mld_version,
        mac: mac.into(),
        flows: flows
            .get(&key)
            .into_iter()
            .flatten()
            .filter(|(flow, _)| filter.accepts(&flow.source))
            .take(MAX_FLOWS)
            .map(|(flow_key, stream)| flow(flow_key, stream, now))
            .collect(),
    };
    let mut known = BTreeSet::new();
    let mut listeners = Vec::new();
    for (view, mac) in departing_listeners(around.inventory, around.mirror, &order.uuid) {
        let key = view.key.managed();
        known.insert((key, mac));
        if let Some(filter) = view.filter() {
            listeners.push(listener(key, mac, &filter, view.value.mld_version));
        }
    }
    // A domain that leaves again right after its arrival may not have reported here at all.
    for (key, mac, filter) in around.arrivals.held_for(order.uuid) {
        if !known.contains(&(key, mac)) {
            listeners.push(listener(key, mac, filter, MLD_VERSION));
        }
    }
    listeners.truncate(MAX_LISTENERS);
    let domain = around.inventory.domains.get(&order.uuid);
    AgentRequest {
        domain_uuid: order.uuid.0.into(),
        domain_name: order.domain.clone(),
        macs: domain
            .iter()
            .flat_map(|domain| &domain.interfaces)
            .take(MAX_NICS)
            .map(|interface| interface.mac.into())
            .collect(),
        listeners,
        vm_transaction: match order.requester {
            Requester::Vm { transaction, .. } => Some(transaction),
            Requester::Operator { .. } | Requester::Unknown | Requester::External { .. } => None,
        },
    }
}

/// Describes a flow for the destination, by the path (native or relayed) of its last packet.
fn flow(key: &StreamKey, stream: &Stream, now: Timestamp) -> Flow {
    const PER_1000_SECONDS: u64 = 1_000_000_000_000;
    let usage = stream.latest();
    Flow {
        source: key.source.into(),
        source_port: key.source_port,
        destination_port: key.destination_port,
        rate_mpps: PER_1000_SECONDS
            .checked_div(usage.interarrival_ns)
            .unwrap_or(0),
        silent_ms: millis(now.since(Timestamp(usage.last_ns))),
    }
}
