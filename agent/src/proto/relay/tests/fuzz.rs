//! A relay, its agents and its senders, in any order. The fixture checks after each input that
//! sessions, joins and map entries agree.

use std::time::Duration;

use arbitrary::{Result, Unstructured};
use common::maps::{RelayStream, StreamUsage, Subscriber, SubscriberKey};
use common::relay::port_pairs;
use common::signal::KnownFlow;

use super::fixture::*;
use crate::proto::relay::RelayConfig;
use crate::proto::{PeerEvent, Stream};

/// Maximum number of inputs.
const INPUTS: usize = 60;

/// Runs a relay on fuzzed inputs, and checks that nothing is left after its agents have gone.
pub(in crate::proto) fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let mut bench = Bench::with(tight());
    for _ in 0..INPUTS {
        if input.is_empty() || next(&mut input, &mut bench).is_err() {
            break;
        }
    }
    bench.wait(HELD * 2);
    assert_eq!(bench.relay.sessions().count(), 0);
    assert!(bench.kernel.subscribers.is_empty());
    assert!(bench.kernel.joined.is_empty());
    assert_eq!(bench.relay.poll_timeout(), None);
}

/// Runs a relay that finds arbitrary map entries, and checks that nothing is left after its agents have
/// gone.
pub(in crate::proto) fn adoption(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let mut bench = Bench::with(tight());
    // Entries without input bytes are absent.
    let _ = fill(&mut input, &mut bench);
    bench.restart_with(tight());
    for _ in 0..INPUTS {
        if input.is_empty() || next(&mut input, &mut bench).is_err() {
            break;
        }
    }
    bench.wait(HELD * 2);
    assert_eq!(bench.relay.sessions().count(), 0);
    assert!(bench.kernel.subscribers.is_empty());
    assert!(bench.kernel.streams.is_empty());
    assert!(bench.kernel.joined.is_empty());
    assert!(bench.kernel.managed.is_empty());
    assert_eq!(bench.relay.poll_timeout(), None);
}

/// Fills the maps, mostly with plausible entries.
fn fill(input: &mut Unstructured<'_>, bench: &mut Bench) -> Result<()> {
    let address = bench.relay.config.address;
    let streams = number(input, 4)?;
    for _ in 0..streams {
        let mut stream = stream(
            group(number(input, 3)?),
            source(number(input, 2)?),
            number(input, 6)?,
        );
        match number(input, 15)? {
            0 => stream.multicast_address = input.arbitrary()?,
            1 => stream.vlan = input.arbitrary()?,
            2 => stream.source_port = input.arbitrary()?,
            _ => {}
        }
        let value = RelayStream {
            flow: count(input)?,
            subscribers: count(input)?,
        };
        bench.kernel.streams.insert(stream, value);
        let subscribers = number(input, 3)?;
        for _ in 0..subscribers {
            let key = SubscriberKey {
                flow: if number(input, 7)? == 0 {
                    count(input)?
                } else {
                    value.flow
                },
                index: count(input)?,
            };
            let agent = agent_address(number(input, 3)?).octets();
            let relay = address.octets();
            let ports = port_pairs(&stream, &relay, &agent).nth(number(input, 200)?.into());
            let (relay_port, agent_port) = ports.unwrap_or_default();
            let mut value = Subscriber {
                lease_end_ns: (bench.now + Duration::from_secs(number(input, 60)?.into())).0,
                relay_address: relay,
                agent_address: agent,
                relay_port,
                agent_port,
                address_difference: input.arbitrary()?,
            };
            match number(input, 15)? {
                0 => value.lease_end_ns = input.arbitrary()?,
                1 => value.relay_address = input.arbitrary()?,
                2 => value.agent_address = input.arbitrary()?,
                // The sum stays valid; the range may not.
                3 => {
                    value.relay_port = agent_port;
                    value.agent_port = relay_port;
                }
                _ => {}
            }
            bench.kernel.subscribers.insert(key, value);
        }
    }
    let others = number(input, 3)?;
    for _ in 0..others {
        let mut key = key(group(number(input, 3)?));
        if number(input, 7)? == 0 {
            key.vlan = input.arbitrary()?;
        }
        bench.kernel.managed.insert(key);
    }
    Ok(())
}

/// Returns a small number, or any.
fn count(input: &mut Unstructured<'_>) -> Result<u32> {
    match number(input, 15)? {
        0 => input.arbitrary(),
        1 => Ok(u32::MAX),
        small => Ok(u32::from(small & 3)),
    }
}

/// Returns limits that the inputs reach.
fn tight() -> RelayConfig {
    let mut config = config();
    config.limits.flows_per_session = 3;
    config.limits.sessions = 4;
    config.limits.sessions_per_agent = 3;
    config.limits.sources = 2;
    config.limits.bits_per_second = 80_000_000;
    config.limits.bits_per_second_per_agent = 50_000_000;
    config.flow_silence = Duration::from_secs(60);
    config
}

fn number(input: &mut Unstructured<'_>, most: u16) -> Result<u16> {
    input.int_in_range(0..=most)
}

fn agent(input: &mut Unstructured<'_>) -> Result<String> {
    let names = ["vms1", "vms2", "vms3", "stranger"];
    Ok((*input.choose(&names)?).to_owned())
}

fn next(input: &mut Unstructured<'_>, bench: &mut Bench) -> Result<()> {
    match number(input, 11)? {
        0..3 => {
            let peer = agent(input)?;
            let mut asked = request(group(number(input, 3)?), agent_address(number(input, 3)?));
            asked.filter_mode = input.int_in_range(0..=3)?;
            let sources = number(input, 3)?;
            for _ in 0..sources {
                asked
                    .sources
                    .push(source(number(input, 2)?).octets().into());
            }
            let flows = number(input, 4)?;
            for _ in 0..flows {
                asked.flows.push(KnownFlow {
                    source: source(number(input, 2)?).octets().into(),
                    source_port: number(input, 3)?,
                    destination_port: 5004,
                });
            }
            bench.ask(&peer, number(input, 3)?.into(), &asked);
        }
        3 => bench.release(&agent(input)?, number(input, 3)?.into()),
        4 => {
            let peer = agent(input)?;
            let length = input.len().min(number(input, 60)?.into());
            let frame = input.bytes(length)?.to_vec();
            let event = PeerEvent::Frame(frame.into());
            bench.relay.handle_peer(bench.now, &peer, event);
            bench.settle();
        }
        5 => {
            let peer = agent(input)?;
            let event = if input.arbitrary()? {
                let from = Some(agent_address(number(input, 3)?).into());
                PeerEvent::Up { from }
            } else {
                let reason = "It is gone".to_owned();
                PeerEvent::Down { reason }
            };
            bench.relay.handle_peer(bench.now, &peer, event);
            bench.settle();
        }
        6 | 7 => {
            let stream = stream(
                group(number(input, 3)?),
                source(number(input, 2)?),
                number(input, 6)?,
            );
            bench.packet(&stream);
        }
        8 => {
            let mut read = Vec::new();
            let length = number(input, 4)?;
            for _ in 0..length {
                let stream = stream(
                    group(number(input, 3)?),
                    source(number(input, 2)?),
                    number(input, 6)?,
                );
                let usage = StreamUsage {
                    packets: input.arbitrary::<u16>()?.into(),
                    bytes: input.arbitrary::<u32>()?.into(),
                    last_ns: bench.now.0 - u64::from(input.arbitrary::<u32>()?),
                    interarrival_ns: input.arbitrary::<u32>()?.into(),
                    ..StreamUsage::default()
                };
                let counts = Stream {
                    native: usage,
                    ..Stream::default()
                };
                read.push((stream, counts));
            }
            bench.read(&read);
        }
        9 => {
            let failure = || "It does not work".to_owned();
            bench.reachable = if input.arbitrary()? {
                Ok(())
            } else {
                Err(failure())
            };
            let address = agent_address(number(input, 3)?);
            let known = bench.reachable.clone();
            bench.relay.handle_neighbour(bench.now, address, known);
            bench.settle();
        }
        10 => bench.restart_with(tight()),
        _ => bench.wait(Duration::from_secs(number(input, 40)?.into())),
    }
    Ok(())
}
