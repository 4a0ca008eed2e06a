//! Builds the parts of the agent from its configuration.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv6Addr;
use std::path::Path;

use common::maps::BridgeNumber;
use common::signal::{self, Register};
use linux::random;
use tokio::sync::mpsc;

use super::RuntimeError;
use super::bridge::{Bridge, Bridges};
use super::event_loop::EventLoop;
use super::gates::Gates;
use super::hooks::Hooks;
use super::turns::Turns;
use crate::clock::now;
use crate::config::{Config, Peer, Sdp};
use crate::control::report::LinkState;
use crate::control::server::ControlServer;
use crate::datapath::{self, BridgeLink, Capacities, Datapath, DatapathConfig};
use crate::glob::Glob;
use crate::hypervisor::libvirt::{DowntimeLimit, Libvirt, LibvirtConfig, MigrateFlagsError};
use crate::hypervisor::{copy_tls, trust};
use crate::job::Job;
use crate::net::addresses::addresses;
use crate::net::links;
use crate::net::neighbour::Neighbours;
use crate::net::peers::{MAX_EVENTS, Peers, PeersConfig};
use crate::net::relays::{Discovery, Source};
use crate::net::tls::{Tls, TlsFiles};
use crate::proto::{self, Agent, AgentConfig};
use crate::role::Role;
use crate::runtime::endpoint;
use crate::runtime::registrar::Registrar;
use crate::runtime::stream_reads::StreamReads;
use crate::runtime::trace::Tracing;
use crate::value::Prefix;

/// Operators' requests that may wait for the loop.
const CONTROL_REQUESTS: usize = 16;

/// Datagrams per second from one VM NIC to the agent; `migkick` sends a few.
const DATAGRAMS_PER_SECOND: u32 = 50;

/// Starts every part. The protocol has received no event yet.
pub(super) async fn start(config: &Config) -> Result<EventLoop, RuntimeError> {
    let name = config.agent.bridge.as_str();
    let datapath = Datapath::load(&datapath_config(config, links::bridge(name)?.ifindex))?;
    let number = datapath.bridge();
    let uplinks = config.agent.uplinks.iter().map(ToString::to_string);
    let bridge = Bridge::open(number, name, uplinks.collect(), config.limits.map_listeners)?;
    let (address, prefix_length) = own_address(config)?;
    let events = datapath.events()?;
    let tracing = Tracing::start(&datapath);
    let gates = Gates::start(&datapath, &config.handover, tracing.replays())?;
    let hooks = Hooks::watch(&datapath, port_limits(config)).map_err(netlink_refused)?;
    let tls = Tls::load(
        &TlsFiles::from(&config.tls),
        config.agent.name.as_str(),
        Role::Agent,
    )?;
    for advice in trust::advice(Path::new("/"), &config.tls.ca) {
        tracing::warn!("{advice}");
    }
    let (peer_sender, peer_events) = mpsc::channel(MAX_EVENTS);
    let peers = Peers::start(peers_config(config, address), tls, peer_sender)?;
    let discovery = Discovery::start(sources(config));
    let (hypervisor_sender, hypervisor_events) = mpsc::unbounded_channel();
    let hypervisor = Libvirt::start(libvirt_config(config)?, hypervisor_sender)?;
    let (control_sender, control) = mpsc::channel(CONTROL_REQUESTS);
    let server = ControlServer::bind(&config.agent.control_socket)?;
    tokio::spawn(server.serve(control_sender, std::future::pending()));
    let seed = seed()?;
    if config.lets_nothing_move() {
        tracing::warn!(
            "No domain may leave or come, as the configuration has no rule [[policy.depart]] and \
             [[policy.arrive]]; its example shows some"
        );
    }
    tracing::info!(
        agent = config.agent.name.as_str(),
        bridge = name,
        %address,
        prefix_length,
        hook = datapath.hook().as_str(),
        "Started"
    );
    let neighbours = Neighbours::open().map_err(netlink_refused)?;
    let mut proto = Agent::new(proto_config(config, address, prefix_length, number), seed);
    proto.handle_copy_tls(now(), copy_tls::find(Path::new("/")));
    proto.handle_pinned(now(), datapath.managed()?, datapath.relay_flows()?);
    proto.handle_forwards(now(), datapath.forwards()?);
    proto.handle_translations(now(), datapath.translations()?);
    Ok(EventLoop {
        proto,
        bridges: Bridges::new([(number, bridge)]),
        neighbours,
        peer_states: config
            .peers
            .iter()
            .map(|peer| (peer.name.to_string(), (LinkState::Down, None)))
            .collect(),
        hypervisor_state: (LinkState::Connecting, None),
        config: config.clone(),
        address,
        prefix_length,
        started: now(),
        turns: Turns::default(),
        stream_reads: StreamReads::new(&datapath),
        tidying: Job::default(),
        datapath,
        events,
        gates,
        hooks,
        peers,
        peer_events,
        registrar: registrar(config, address),
        discovery,
        relay_problems: Vec::new(),
        hypervisor,
        hypervisor_events,
        control,
        commands: BTreeMap::new(),
        next_command: 1,
        tracing,
        maps_known: false,
        adopted: false,
    })
}

fn netlink_refused(error: io::Error) -> RuntimeError {
    RuntimeError::System {
        what: "netlink",
        error,
    }
}

/// Returns the limits for the port of one VM.
fn port_limits(config: &Config) -> datapath::Limits {
    datapath::Limits {
        listeners: config.limits.listeners,
        sources: config.limits.sources,
        reports_per_second: config.limits.reports_per_second,
        datagrams_per_second: DATAGRAMS_PER_SECOND,
        flows: config.limits.flows,
    }
}

/// Returns the address at which arriving VMs reach this agent, and the prefix length in bits.
fn own_address(config: &Config) -> Result<(Ipv6Addr, u8), RuntimeError> {
    let bridge = config.agent.bridge.as_str();
    let found = addresses(bridge)?.global;
    let address = config.agent.address.or(found.map(|(address, _)| address));
    let length = config
        .agent
        .prefix
        .map(Prefix::length)
        .or(found.map(|(_, length)| length));
    address.zip(length).ok_or_else(|| RuntimeError::NoAddress {
        bridge: bridge.to_owned(),
    })
}

fn datapath_config(config: &Config, bridge_ifindex: u32) -> DatapathConfig {
    DatapathConfig {
        pin_root: config.agent.pin_root.clone(),
        bridge: Some(BridgeLink {
            ifindex: bridge_ifindex,
            name: config.agent.bridge.to_string(),
        }),
        hook: None,
        uplink_hook: config.agent.uplink_hook,
        capacities: Capacities {
            listeners: config.limits.map_listeners,
            sources: config.limits.map_sources,
            managed: config.limits.map_managed,
            streams: config.limits.map_streams,
            delivered: config.handover.map_delivered,
            record_slots: config.handover.recorded_nics,
            held_bytes: config.handover.ring_mib << 20,
            ..Capacities::default()
        },
        flows_per_address: config.limits.flows_per_address,
    }
}

fn peers_config(config: &Config, address: Ipv6Addr) -> PeersConfig {
    let agents = config.peers.iter().map(|peer| endpoint(peer, Role::Agent));
    let servers = config
        .relay
        .mcs
        .iter()
        .map(|peer| endpoint(peer, Role::Mcs));
    PeersConfig {
        name: config.agent.name.to_string(),
        listen: config.agent.listen.into(),
        peers: agents.chain(servers).collect(),
        admit: config.tls.admit.iter().map(Glob::to_lowercase).collect(),
        relays_from: Some(address),
    }
}

/// Returns the places in which to look for relays.
fn sources(config: &Config) -> Vec<Source> {
    let relay = &config.relay;
    if !relay.is_used() {
        return Vec::new();
    }
    let named = |key, peers: &[Peer]| Source::Listed {
        key,
        relays: peers
            .iter()
            .map(|peer| (peer.name.to_string(), peer.address.to_string()))
            .collect(),
    };
    let mut sources = Vec::new();
    if !relay.servers.is_empty() {
        sources.push(named("servers", &relay.servers));
    }
    if let Some(anycast) = &relay.anycast {
        sources.push(named("anycast", std::slice::from_ref(anycast)));
    }
    if let Some(dns) = &relay.dns {
        sources.push(Source::Dns {
            host: dns.host.clone(),
            port: dns.port,
            name: relay
                .name
                .as_ref()
                .map_or_else(|| dns.host.clone(), ToString::to_string),
        });
    }
    match &relay.sdp {
        Some(Sdp::File(path)) => sources.push(Source::SdpFile(path.clone())),
        Some(Sdp::Url(url)) => sources.push(Source::SdpUrl(url.clone())),
        None => {}
    }
    sources
}

fn registrar(config: &Config, address: Ipv6Addr) -> Registrar {
    let servers: &[Peer] = if config.relay.enabled {
        &config.relay.mcs
    } else {
        &[]
    };
    let register = Register {
        role: signal::Role::Agent,
        address: address.octets().into(),
        site: config.relay.site.as_str().to_owned(),
        serves: Vec::new(),
    };
    Registrar::new(register, servers)
}

fn libvirt_config(config: &Config) -> Result<LibvirtConfig, MigrateFlagsError> {
    let libvirt = &config.libvirt;
    Ok(LibvirtConfig {
        uri: libvirt.uri.clone(),
        bridge: config.agent.bridge.to_string(),
        flags: libvirt.migrate_flags()?,
        bandwidth: (libvirt.bandwidth_mib > 0).then_some(libvirt.bandwidth_mib),
        downtime_limit: Some(DowntimeLimit::new(libvirt.downtime, libvirt.max_downtime)),
        parallel_connections: u16::try_from(libvirt.parallel_connections)
            .ok()
            .filter(|&connections| connections > 0),
        metadata: libvirt.metadata.then(|| config.agent.name.clone()),
    })
}

fn proto_config(
    config: &Config,
    address: Ipv6Addr,
    prefix_length: u8,
    bridge: BridgeNumber,
) -> AgentConfig {
    let defaults = proto::Limits::default();
    let listeners = usize::try_from(config.limits.listeners).unwrap_or(usize::MAX);
    AgentConfig {
        name: config.agent.name.to_string(),
        peers: config
            .peers
            .iter()
            .map(|peer| proto::Peer {
                name: peer.name.to_string(),
                connect_uri: peer.connect_uri(),
                migrate_uri: peer.migrate_uri(),
            })
            .collect(),
        address,
        prefix_length,
        bridge,
        policy: config.policy.clone(),
        limits: proto::Limits {
            // A domain has several NICs, and the limit holds for each NIC.
            listeners_per_domain: listeners
                .saturating_mul(2)
                .max(defaults.listeners_per_domain),
            ..defaults
        },
        timing: proto::Timing {
            tree_budget: config.destination.tree_budget,
            unused_join_expiry: config.destination.join_expiry,
            gate_max: config.handover.gate_max,
            ..proto::Timing::default()
        },
        relay: config.relay.is_used().then_some(proto::RelayTiming {
            delay: config.relay.delay,
            watch_interval: config.relay.watch_interval,
            silence: config.relay.silence,
            settle: config.relay.settle,
            hold: config.relay.hold,
        }),
        handover: config.handover.enabled,
        unicast: proto::UnicastTiming {
            retransmit: config.mobility.retransmit,
            forward: config.mobility.forward,
            defence: config.mobility.defence,
            disputed: config.mobility.disputed,
        },
        copy: config.libvirt.copy(),
    }
}

/// Returns a random number, so that no two starts of an agent have the same.
fn seed() -> Result<u64, RuntimeError> {
    random::number().map_err(|error| RuntimeError::System {
        what: "random numbers",
        error,
    })
}
