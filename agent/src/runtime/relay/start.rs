//! Builds the parts of the relay from its configuration, and adopts the state of an earlier relay.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use common::counter::Counter;
use common::maps::{ManagedKey, NO_BRIDGE};
use common::signal::{self, AddressRange, Register};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::RelayError;
use super::event_loop::RelayLoop;
use super::interface::Interface;
use crate::clock::now;
use crate::config::RelayConfig;
use crate::control::server::ControlServer;
use crate::datapath::{Capacities, Datapath, DatapathConfig};
use crate::glob::Glob;
use crate::job::Job;
use crate::net::addresses::addresses;
use crate::net::fd_store::Inherited;
use crate::net::neighbour::Neighbours;
use crate::net::peers::{MAX_EVENTS, Peers, PeersConfig};
use crate::net::tls::{Tls, TlsFiles};
use crate::proto::relay::{self, Adopted, RelayServer, Rule};
use crate::role::Role;
use crate::runtime::endpoint;
use crate::runtime::registrar::Registrar;
use crate::runtime::stream_reads::StreamReads;
use crate::runtime::trace::Tracing;

/// Operators' requests that may wait for the loop.
const CONTROL_REQUESTS: usize = 16;
/// Interval at which the relay reads the streams.
const MEASURE_INTERVAL: std::time::Duration = std::time::Duration::from_secs(5);
/// Entries of maps that only an agent uses.
const UNUSED: u32 = 64;

/// Starts every part. The caller must be within a tokio runtime.
pub(super) fn start(config: &RelayConfig) -> Result<RelayLoop, RelayError> {
    let name = config.relay.name.as_str();
    let address = own_address(config)?;
    let inherited = Inherited::take();
    let datapath = Datapath::load(&datapath_config(config))?;
    let mut interfaces = Vec::new();
    for interface in &config.relay.interfaces {
        interfaces.push(Interface::open(&datapath, interface.as_str())?);
    }
    let indices: Vec<u32> = interfaces.iter().map(|it| it.ifindex).collect();
    datapath.retain_replicate(&indices)?;
    let mut proto = RelayServer::new(proto_config(config, address));
    proto.handle_adopted(now(), adopted(&datapath, &mut interfaces)?);
    let events = datapath.events()?;
    let tls = Tls::load(&TlsFiles::from(&config.tls), name, Role::Relay)?;
    let server = ControlServer::bind(&config.relay.control_socket)?;
    let (peer_sender, peer_events) = mpsc::channel(MAX_EVENTS);
    let peers = Peers::start(peers_config(config), tls, peer_sender)?;
    let (control_sender, control) = mpsc::channel(CONTROL_REQUESTS);
    tokio::spawn(server.serve(control_sender, std::future::pending()));
    let neighbours = Neighbours::open().map_err(|error| RelayError::System {
        what: "netlink",
        error,
    })?;
    tracing::info!(
        relay = name,
        %address,
        hook = datapath.hook().as_str(),
        inherited = inherited.len(),
        "Started"
    );
    Ok(RelayLoop {
        registrar: registrar(config, address),
        config: config.clone(),
        address,
        started: now(),
        proto,
        tracing: Tracing::start(&datapath),
        without_forwarding: datapath.counter(Counter::ReplicateNoForwarding)?,
        stream_reads: StreamReads::new(&datapath),
        tidying: Job::default(),
        datapath,
        events,
        interfaces,
        neighbours,
        resolving: BTreeMap::new(),
        inherited: (!inherited.is_empty())
            .then(|| (inherited, Instant::now() + config.relay.lease)),
        peers,
        peer_events,
        control,
    })
}

fn own_address(config: &RelayConfig) -> Result<Ipv6Addr, RelayError> {
    if let Some(address) = config.relay.address {
        return Ok(address);
    }
    let interface = config
        .relay
        .interfaces
        .first()
        .map(ToString::to_string)
        .unwrap_or_default();
    addresses(&interface)?
        .global
        .map(|(address, _)| address)
        .ok_or(RelayError::NoAddress { interface })
}

/// Returns the pinned and joined state of an earlier relay.
fn adopted(datapath: &Datapath, interfaces: &mut [Interface]) -> Result<Adopted, RelayError> {
    let mut joined = BTreeSet::new();
    for interface in interfaces {
        joined.extend(interface.held_by_kernel()?);
    }
    let subscribers = datapath.subscribers()?;
    // Counters of subscribers that were removed just before the earlier relay was killed.
    let live: BTreeSet<_> = subscribers.iter().map(|(key, _)| *key).collect();
    for (key, _) in datapath.subscriber_usages()? {
        if !live.contains(&key) {
            datapath.subscriber_usage_reset(&key)?;
        }
    }
    Ok(Adopted {
        streams: datapath.relay_streams()?,
        subscribers,
        managed: datapath
            .managed()?
            .into_iter()
            .map(|(key, _)| key)
            .collect(),
        joined: joined
            .into_iter()
            .map(|address| ManagedKey {
                vlan: 0,
                bridge: NO_BRIDGE,
                multicast_address: address.octets(),
            })
            .collect(),
    })
}

fn datapath_config(config: &RelayConfig) -> DatapathConfig {
    let limits = &config.limits;
    DatapathConfig {
        pin_root: config.relay.pin_root.clone(),
        capacities: Capacities {
            listeners: UNUSED,
            sources: UNUSED,
            ports: UNUSED,
            relay_flows: UNUSED,
            relays: UNUSED,
            fingerprints: UNUSED,
            delivered: UNUSED,
            record_slots: UNUSED,
            held_bytes: 65_536,
            managed: limits.map_managed,
            streams: limits.map_streams,
            relay_streams: limits.map_streams,
            subscribers: limits.map_subscribers,
            ..Capacities::default()
        },
        flows_per_address: limits.flows_per_address,
        ..DatapathConfig::default()
    }
}

fn peers_config(config: &RelayConfig) -> PeersConfig {
    let agents = config.policy.iter().flat_map(|rule| &rule.agents);
    PeersConfig {
        name: config.relay.name.to_string(),
        listen: config.relay.listen.into(),
        peers: config
            .mcs
            .iter()
            .map(|server| endpoint(server, Role::Mcs))
            .collect(),
        admit: agents
            .chain(&config.tls.admit)
            .map(Glob::to_lowercase)
            .collect(),
        relays_from: None,
    }
}

fn registrar(config: &RelayConfig, address: Ipv6Addr) -> Registrar {
    let ranges = config
        .policy
        .iter()
        .flat_map(|rule| &rule.multicast_addresses);
    let register = Register {
        role: signal::Role::Relay,
        address: address.octets().into(),
        site: config.relay.site.as_str().to_owned(),
        serves: ranges
            .map(|prefix| AddressRange {
                address: prefix.address.octets().into(),
                length: prefix.length,
            })
            .collect(),
    };
    Registrar::new(register, &config.mcs)
}

fn proto_config(config: &RelayConfig, address: Ipv6Addr) -> relay::RelayConfig {
    let limits = &config.limits;
    let count = |limit: u32| usize::try_from(limit).unwrap_or(usize::MAX);
    let bits = |megabits: u64| match megabits {
        0 => u64::MAX,
        _ => megabits.saturating_mul(1_000_000),
    };
    relay::RelayConfig {
        name: config.relay.name.to_string(),
        address,
        policy: config
            .policy
            .iter()
            .map(|rule| Rule {
                // Names in certificates arrive in lower case.
                agents: rule.agents.iter().map(Glob::to_lowercase).collect(),
                ..rule.clone()
            })
            .collect(),
        limits: relay::RelayLimits {
            sessions: count(limits.sessions),
            sessions_per_agent: count(limits.sessions_per_agent),
            flows_per_session: count(limits.flows_per_session),
            sources: count(limits.sources),
            bits_per_second: bits(limits.megabits_per_second),
            bits_per_second_per_agent: bits(limits.megabits_per_second_per_agent),
        },
        lease: config.relay.lease,
        flow_silence: config.relay.flow_silence,
        measure_interval: MEASURE_INTERVAL,
    }
}
