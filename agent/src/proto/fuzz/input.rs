//! One input of an agent, chosen by bytes.

use std::net::SocketAddrV6;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use common::event::Change;
use common::group;
use common::maps::{
    Listener, ListenerKey, Origin, PortUsage, Querier, QuerierKey, Source, SourceKey, StreamKey,
    StreamUsage,
};
use common::signal::PORT;

use super::BRIDGE;
use super::message::{
    PEERS, key, list, mac, name, nic_cut, number, of_peer, of_vm, transaction, unicast, uuid,
};
use super::world::World;
use crate::proto::handover::{HoldReport, UnreadReport};
use crate::proto::*;

/// Feeds one input.
pub(super) fn next(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    match number(input, 19)? {
        0 | 1 => frame(input, world),
        2 => {
            let peer = *input.choose(&PEERS)?;
            if input.arbitrary()? {
                world.link(peer, PeerEvent::Up { from: None });
            } else {
                let reason = "It is gone".to_owned();
                world.link(peer, PeerEvent::Down { reason });
            }
            Ok(())
        }
        3 => garbage(input, world),
        4 => datagram(input, world),
        5 => port(input, world),
        6 | 7 => hypervisor(input, world),
        8 => gate(input, world),
        9 => address(input, world),
        10 => command(input, world),
        11 => relays(input, world),
        12 => listener(input, world),
        13 => source(input, world),
        14 => datapath(input, world),
        15 => streams(input, world),
        16 => snapshot(input, world),
        _ => {
            let times = [1, 20, 60, 250, 1000, 2600, 6000, 30_000, 130_000];
            world.pass(Duration::from_millis(*input.choose(&times)?));
            Ok(())
        }
    }
}

fn frame(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let peer = *input.choose(&PEERS)?;
    let transaction = transaction(input, &world.transactions)?;
    let bytes = of_peer(input)?.encode(transaction);
    world.link(peer, PeerEvent::Frame(bytes.into()));
    Ok(())
}

/// Feeds a frame or a datagram that is most probably not a message.
fn garbage(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let peer = *input.choose(&PEERS)?;
    let length = usize::from(number(input, 40)?);
    let bytes = input.bytes(length.min(input.len()))?.to_vec();
    if input.arbitrary()? {
        world.link(peer, PeerEvent::Frame(bytes.into()));
    } else {
        spoken(input, world, &bytes)?;
    }
    Ok(())
}

fn datagram(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let transaction = u64::from(number(input, 3)?);
    let bytes = of_vm(input)?.encode(transaction);
    spoken(input, world, &bytes)
}

fn spoken(input: &mut Unstructured<'_>, world: &mut World, bytes: &[u8]) -> Result<()> {
    let from = SocketAddrV6::new(unicast(input)?, PORT, 0, 3);
    let port = ifindex(input)?;
    world.input(|agent, now| agent.handle_datagram(now, port, from, bytes));
    Ok(())
}

fn ifindex(input: &mut Unstructured<'_>) -> Result<u32> {
    Ok(10 + u32::from(number(input, 3)?))
}

fn device(ifindex: u32) -> String {
    format!("vnet{ifindex}")
}

fn port(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let ifindex = ifindex(input)?;
    if number(input, 2)? == 0 {
        world.unplug(ifindex);
        return Ok(());
    }
    let [_, rest @ ..] = mac(input)?;
    let [b, c, d, e, f] = rest;
    let port = Port {
        bridge: BRIDGE,
        ifindex,
        name: device(ifindex),
        mac: [0xfe, b, c, d, e, f],
    };
    world.ports.insert(ifindex);
    world.input(|agent, now| agent.handle_port(now, PortEvent::Added(port)));
    Ok(())
}

fn hypervisor(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let uuid = uuid(input)?;
    let at = world.now;
    let stats = JobStats::default();
    let event = match number(input, 12)? {
        0 | 1 => HypervisorEvent::Connected,
        2 => HypervisorEvent::Disconnected {
            reason: "It is gone".to_owned(),
        },
        3..6 => HypervisorEvent::Domain(Domain {
            uuid,
            name: name(input)?,
            running: input.arbitrary()?,
            interfaces: list(input, 2, |input| {
                Ok(DomainInterface {
                    target_dev: device(ifindex(input)?),
                    mac: mac(input)?,
                    vhost: input.arbitrary()?,
                })
            })?,
        }),
        6 => HypervisorEvent::Arriving {
            uuid,
            name: name(input)?,
        },
        7 => HypervisorEvent::Gone(uuid),
        8 => HypervisorEvent::Suspended { uuid, at },
        9 => HypervisorEvent::Resumed {
            uuid,
            migrated: input.arbitrary()?,
            at,
        },
        10 => HypervisorEvent::Progress { uuid, stats },
        11 => HypervisorEvent::Departing { uuid },
        _ => HypervisorEvent::MigrationEnded {
            uuid,
            result: if input.arbitrary()? {
                Ok(stats)
            } else {
                Err("No route to host".to_owned())
            },
        },
    };
    if let HypervisorEvent::Departing { uuid } = event {
        world.migrating.insert(uuid);
    }
    world.hypervisor(event);
    Ok(())
}

fn gate(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let ifindex = ifindex(input)?;
    let event = match number(input, 6)? {
        0 | 1 => GateEvent::Cut {
            ifindex,
            cut: nic_cut(input)?,
        },
        2 => GateEvent::Opened {
            ifindex,
            report: HoldReport::default(),
        },
        3 => GateEvent::SentOn {
            migration: number(input, 3)?.into(),
            report: UnreadReport::default(),
        },
        4 => GateEvent::NotRecorded { ifindex },
        5 => GateEvent::RunsOn {
            migration: number(input, 3)?.into(),
            thrown_away_at_most: input.arbitrary()?,
        },
        _ => GateEvent::NotHeld { ifindex },
    };
    world.gate(event);
    Ok(())
}

fn address(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let address = unicast(input)?;
    let event = match number(input, 5)? {
        0 | 1 => AddressEvent::Heard {
            address,
            said: match number(input, 2)? {
                0 => Said::Has,
                1 => Said::Wants,
                _ => Said::Asks(unicast(input)?),
            },
            by: mac(input)?,
        },
        2 => AddressEvent::Own { address },
        3 => AddressEvent::Spoke { address },
        4 => AddressEvent::Forwarded {
            address,
            packets: input.arbitrary()?,
            bytes: 1,
            dropped: 0,
        },
        _ => AddressEvent::Translated {
            ifindex: ifindex(input)?,
            address,
            packets: input.arbitrary()?,
            bytes: 1,
            dropped: 0,
        },
    };
    world.input(|agent, now| agent.handle_address(now, BRIDGE, event));
    Ok(())
}

fn command(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let domain = name(input)?;
    let peer = (*input.choose(&PEERS)?).to_owned();
    let command = match number(input, 3)? {
        0 | 1 => Command::Migrate {
            domain,
            destination: peer,
        },
        2 => Command::Abort { domain },
        _ => Command::Prepare {
            uuid: uuid(input)?,
            domain,
            source: peer,
        },
    };
    world.command(command);
    Ok(())
}

fn relays(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let found = number(input, 2)?;
    let candidates = ["relay1", "relay2"]
        .iter()
        .take(found.into())
        .map(|name| RelayCandidate {
            name: (*name).to_owned(),
            address: "[2001:db8:1::4]:47411".to_owned(),
            found_by: "servers".to_owned(),
        })
        .collect();
    world.input(|agent, now| agent.handle_relays(now, candidates));
    Ok(())
}

fn listener_key(input: &mut Unstructured<'_>, world: &World) -> Result<Option<ListenerKey>> {
    let (ifindex, key) = (ifindex(input)?, key(input)?);
    // The eBPF programs run on TAPs only, and ignore link-scope addresses.
    let is_kept = world.ports.contains(&ifindex) && group::is_routable(&key.multicast_address);
    Ok(is_kept.then_some(ListenerKey {
        ifindex,
        vlan: key.vlan,
        bridge: key.bridge,
        multicast_address: key.multicast_address,
    }))
}

fn listener(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let Some(key) = listener_key(input, world)? else {
        return Ok(());
    };
    let removed = number(input, 3)? == 0;
    let answers = input.arbitrary::<bool>()?;
    let mut value = Listener {
        first_report_ns: world.now.0,
        last_report_ns: world.now.0,
        last_answer_ns: if answers { world.now.0 } else { 0 },
        generation: number(input, 1)?.into(),
        source_count: number(input, 1)?.into(),
        filter_mode: 1 + number(input, 1)?,
        mld_version: 2,
        guest_mac: mac(input)?,
    };
    let change = if removed {
        match world.kernel.listeners.remove(&key) {
            Some(last) => value = last,
            None => return Ok(()),
        }
        world
            .kernel
            .sources
            .retain(|source, _| source.listener != key);
        Change::Removed
    } else {
        world.kernel.listeners.insert(key, value);
        Change::Updated
    };
    let event = DatapathEvent::Listener { change, key, value };
    world.input(|agent, now| agent.handle_datapath(now, event));
    Ok(())
}

fn source(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let Some(listener) = listener_key(input, world)? else {
        return Ok(());
    };
    let key = SourceKey {
        listener,
        source: unicast(input)?.octets(),
    };
    let value = Source {
        last_report_ns: world.now.0,
        generation: number(input, 1)?.into(),
        filter_mode: 1 + number(input, 1)?,
        pad: [0; 3],
    };
    let change = if number(input, 3)? == 0 {
        world.kernel.sources.remove(&key);
        Change::Removed
    } else {
        world.kernel.sources.insert(key, value);
        Change::Updated
    };
    let event = DatapathEvent::Source { change, key, value };
    world.input(|agent, now| agent.handle_datapath(now, event));
    Ok(())
}

fn stream_key(input: &mut Unstructured<'_>) -> Result<StreamKey> {
    let key = key(input)?;
    Ok(StreamKey {
        multicast_address: key.multicast_address,
        source: unicast(input)?.octets(),
        source_port: 5004,
        destination_port: number(input, 1)?.into(),
        vlan: key.vlan,
        bridge: key.bridge,
    })
}

fn datapath(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let event = match number(input, 5)? {
        0 | 1 => DatapathEvent::FirstPacket {
            key: stream_key(input)?,
            origin: *input.choose(&[Origin::Native, Origin::Relay])?,
            at: world.now,
        },
        2 => query(input, world)?,
        3 => DatapathEvent::Usage {
            ifindex: ifindex(input)?,
            usage: PortUsage {
                malformed: input.arbitrary()?,
                refused_reports: input.arbitrary()?,
                ..PortUsage::default()
            },
        },
        4 => {
            let key = key(input)?;
            DatapathEvent::Refused {
                listeners: vec![crate::proto::host::listeners::listener_key(
                    ifindex(input)?,
                    &key,
                )],
                sources: Vec::new(),
            }
        }
        _ => DatapathEvent::Failed {
            key: key(input)?,
            reason: "No room".to_owned(),
        },
    };
    world.input(|agent, now| agent.handle_datapath(now, event));
    Ok(())
}

fn query(input: &mut Unstructured<'_>, world: &World) -> Result<DatapathEvent> {
    let key = QuerierKey {
        ifindex: 2,
        vlan: number(input, 1)?.into(),
        bridge: BRIDGE,
    };
    let value = Querier {
        last_query_ns: world.now.0,
        address: [0xfe; 16],
        query_interval_ms: input.arbitrary::<u16>()?.into(),
        query_response_interval_ms: input.arbitrary::<u16>()?.into(),
        robustness: number(input, 7)?,
        mld_version: 2,
        pad: [0; 3],
    };
    Ok(DatapathEvent::Query { key, value })
}

fn streams(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let choice = usize::from(number(input, 8)?);
    let token = world.tokens.get(choice).copied().unwrap_or_default();
    let now = world.now.0;
    let streams = list(input, 3, |input| {
        let mut usage = || -> Result<StreamUsage> {
            Ok(StreamUsage {
                packets: input.arbitrary::<u16>()?.into(),
                bytes: input.arbitrary::<u32>()?.into(),
                first_ns: now,
                last_ns: now.saturating_sub(input.arbitrary::<u32>()?.into()),
                interarrival_ns: input.arbitrary::<u32>()?.into(),
                dropped: 0,
            })
        };
        let stream = Stream {
            native: usage()?,
            relay: usage()?,
        };
        Ok((stream_key(input)?, stream))
    })?;
    let event = DatapathEvent::Streams { token, streams };
    world.input(|agent, now| agent.handle_datapath(now, event));
    Ok(())
}

/// Feeds a snapshot after lost events.
pub(super) fn snapshot(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    if number(input, 3)? == 0 {
        world.kernel.listeners.pop_first();
    }
    let kernel = &world.kernel;
    let event = DatapathEvent::Snapshot {
        listeners: kernel.listeners.iter().map(|(k, v)| (*k, *v)).collect(),
        sources: kernel.sources.iter().map(|(k, v)| (*k, *v)).collect(),
        queriers: Vec::new(),
    };
    world.input(|agent, now| agent.handle_datapath(now, event));
    Ok(())
}
