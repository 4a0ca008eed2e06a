//! A node among servers, peers and strangers that send anything.

use std::collections::VecDeque;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use common::mat::entropy::Entropy;
use common::mat::key::{KEY_BYTES, Key};
use common::mat::message::{
    Alert, AlertAck, Echo, EchoReply, LookupReply, Mapping, MatMessage, Moa, UpdateReply,
};
use common::mat::seal::{Keying, NONCE_BYTES, Sealed, seal};
use common::mat::{IMS_PORT, NODE_PORT};
use common::signal::MAX_DATAGRAM_BYTES;

use super::*;

/// Limit of inputs per run.
const INPUTS: usize = 80;
/// Limit of outputs per input.
const MAX_OUTPUTS: usize = 512;
/// Limit of calls at one time.
const MAX_CALLS: u32 = 16;
/// Transactions of the node that an input may answer.
const REMEMBERED: usize = 8;
const NODE_KEY: Key = Key([3; KEY_BYTES]);
const PAIR_KEY: Key = Key([5; KEY_BYTES]);
const EPOCH_MS: u64 = 1_800_000_000_000;

struct World {
    core: Core,
    now: Duration,
    /// Last transactions of the node.
    asked: VecDeque<u64>,
}

/// Runs a node over the inputs.
pub(crate) fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let identity = Identity {
        hoa: hoa(0),
        home: (Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 0, 0, 0), 48),
        key: NODE_KEY,
        servers: vec![server(1), server(2)],
    };
    let mut count = 0_u64;
    let entropy = Entropy::new(move |bytes| {
        count += 1;
        for (place, byte) in bytes.iter_mut().zip(count.to_le_bytes()) {
            *place = byte;
        }
        true
    });
    let timing = Timing {
        lifetime: Duration::from_secs(60),
        idle: Duration::from_secs(20),
        ..Timing::default()
    };
    let core = Core::new(identity, timing, Saved::default(), EPOCH_MS, entropy);
    let mut world = World {
        core,
        now: Duration::from_secs(1),
        asked: VecDeque::new(),
    };
    for _ in 0..INPUTS {
        if input.is_empty() || next(&mut input, &mut world).is_err() {
            break;
        }
        world.settle();
    }
    // Nobody answers, and nobody sends any more.
    world.pass(Duration::from_secs(300));
    assert_eq!(world.core.held, 0, "frames are held for ever");
    assert!(world.core.peers.is_empty(), "{:?}", world.core.peers);
}

fn hoa(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 0, 0, 0x10 + number)
}

fn moa(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 1 + number / 4, 0, 0, 0, 0, 0x100 + number)
}

fn server(number: u16) -> SocketAddrV6 {
    let address = Ipv6Addr::new(0x2001, 0xdb8, 0xff, 0, 0, 0, 0, number);
    SocketAddrV6::new(address, IMS_PORT, 0, 0)
}

impl World {
    fn settle(&mut self) {
        let mut outputs = 0;
        while let Some(output) = self.core.poll_output() {
            outputs += 1;
            assert!(outputs < MAX_OUTPUTS, "too many outputs");
            if let Output::Transmit { bytes, .. } = output {
                assert!(bytes.len() <= MAX_DATAGRAM_BYTES);
                self.remember(&bytes);
            }
        }
        assert!(self.core.held <= MAX_HELD.1);
    }

    fn remember(&mut self, bytes: &[u8]) {
        let sealed = Sealed::parse(bytes);
        let Ok(sealed) = sealed else {
            unreachable!("the node sends what is no message");
        };
        let key = match sealed.keying {
            Keying::Node => NODE_KEY,
            Keying::Pair => PAIR_KEY,
        };
        let message = sealed.open(&key).ok();
        if let Some((transaction, _)) = message.and_then(|it| MatMessage::decode(&it).ok()) {
            self.asked.push_front(transaction);
            self.asked.truncate(REMEMBERED);
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        let mut calls = 0;
        while let Some(due) = self.core.poll_timeout().filter(|due| *due <= end) {
            // One timer may make another due at once, but not for ever.
            calls = if due > self.now { 0 } else { calls + 1 };
            assert!(calls < MAX_CALLS, "what is due is not done");
            self.now = self.now.max(due);
            self.core.handle_timeout(self.now);
            self.settle();
        }
        self.now = end;
    }
}

fn number(input: &mut Unstructured<'_>, most: u16) -> Result<u16> {
    input.int_in_range(0..=most)
}

fn moas(input: &mut Unstructured<'_>) -> Result<Vec<Moa>> {
    let length = number(input, 3)?;
    (0..length)
        .map(|_| {
            Ok(Moa {
                address: moa(number(input, 7)?).octets().into(),
                priority: input.int_in_range(0..=3)?,
            })
        })
        .collect()
}

fn sequence(input: &mut Unstructured<'_>) -> Result<u64> {
    Ok(EPOCH_MS + u64::from(number(input, 5)?))
}

fn place(input: &mut Unstructured<'_>) -> Result<Place> {
    Ok(Place {
        ifindex: 1 + u32::from(number(input, 1)?),
        moa: moa(number(input, 7)?),
    })
}

fn next(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    match number(input, 14)? {
        0..3 => from_server(input, world)?,
        3..6 => from_peer(input, world)?,
        6 => {
            let length = input.len().min(number(input, 120)?.into());
            let bytes = input.bytes(length)?.to_vec();
            let received = Received {
                local: moa(0),
                from: server(number(input, 2)?),
                bytes,
            };
            world.core.handle_datagram(world.now, received);
        }
        7 => {
            let length = number(input, 2)?;
            let nics = (0..length)
                .map(|nic| {
                    let addresses = number(input, 2)?;
                    Ok(NicState {
                        ifindex: 1 + u32::from(nic),
                        addresses: (0..addresses)
                            .map(|_| Ok(moa(number(input, 7)?)))
                            .collect::<Result<_>>()?,
                    })
                })
                .collect::<Result<_>>()?;
            world.core.handle_nics(world.now, nics);
        }
        8 | 9 => {
            let peer = hoa(number(input, 3)?);
            let frame = vec![0; number(input, 3000)?.into()];
            world.core.handle_held(world.now, peer, frame);
        }
        10 => match number(input, 4)? {
            0 | 1 => world.core.prepare(world.now, place(input)?),
            2 => drop(world.core.ready(world.now)),
            3 => world.core.handle_announcement(world.now),
            _ => world.core.handle_hint(world.now),
        },
        11 => world.core.abort(world.now),
        _ => {
            let times = [10, 60, 100, 1000, 3000, 30_000];
            world.pass(Duration::from_millis(*input.choose(&times)?));
        }
    }
    Ok(())
}

fn from_server(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let message: MatMessage = if input.arbitrary()? {
        UpdateReply {
            outcome: input.int_in_range(0..=6)?,
            sequence: sequence(input)?,
            time_ms: input.arbitrary()?,
            lifetime_s: number(input, 100)?.into(),
        }
        .into()
    } else {
        let mapping = if input.arbitrary()? {
            Some(Mapping {
                sequence: sequence(input)?,
                moas: moas(input)?,
            })
        } else {
            None
        };
        LookupReply {
            hoa: hoa(number(input, 3)?).octets().into(),
            mapping,
            pair_key: PAIR_KEY.0.into(),
            lifetime_s: number(input, 100)?.into(),
        }
        .into()
    };
    let from = server(1 + number(input, 1)?);
    say(input, world, Keying::Node, hoa(0), from, &message)
}

fn from_peer(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let message: MatMessage = match number(input, 3)? {
        0 => Alert {
            sequence: sequence(input)?,
        }
        .into(),
        1 => AlertAck {
            sequence: sequence(input)?,
        }
        .into(),
        2 => Echo {}.into(),
        _ => EchoReply {}.into(),
    };
    let peer = hoa(number(input, 3)?);
    let from = SocketAddrV6::new(moa(number(input, 7)?), NODE_PORT, 0, 0);
    say(input, world, Keying::Pair, peer, from, &message)
}

fn say(
    input: &mut Unstructured<'_>,
    world: &mut World,
    keying: Keying,
    hoa: Ipv6Addr,
    from: SocketAddrV6,
    message: &MatMessage,
) -> Result<()> {
    let choice = number(input, 9)?;
    let asked = world.asked.get(usize::from(choice)).copied();
    let bytes = message.encode(asked.unwrap_or(choice.into()));
    let key = match keying {
        Keying::Node => NODE_KEY,
        Keying::Pair => PAIR_KEY,
    };
    let received = Received {
        local: moa(number(input, 7)?),
        from,
        bytes: seal(keying, hoa.octets(), &key, [8; NONCE_BYTES], &bytes),
    };
    world.core.handle_datagram(world.now, received);
    Ok(())
}
