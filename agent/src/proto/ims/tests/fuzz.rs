//! Nodes and strangers, in any order: no address has two living nodes, and the tables agree.

use arbitrary::{Result, Unstructured};

use super::*;

/// Maximum number of inputs.
const INPUTS: usize = 40;

/// Runs a server on fuzzed inputs.
pub(in crate::proto) fn run(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let mut world = World::new();
    for _ in 0..INPUTS {
        if input.is_empty() || next(&mut input, &mut world).is_err() {
            break;
        }
        while let Some(reply) = world.ims.poll_reply() {
            assert!(reply.bytes.len() <= common::signal::MAX_DATAGRAM_BYTES);
        }
        world.check();
    }
    // All pending writes complete.
    world.store();
    assert!(world.ims.staged.is_empty() && world.ims.waiting.is_empty());
    world.check();
    world.pass(world.config.max_lifetime * 3);
    assert_eq!(
        world.ims.counts(world.now.monotonic).1,
        0,
        "a mapping lives on"
    );
    assert_eq!(world.ims.poll_timeout(), None);
}

fn number(input: &mut Unstructured<'_>, most: u16) -> Result<u16> {
    input.int_in_range(0..=most)
}

fn next(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    match number(input, 13)? {
        0..4 => {
            let node = number(input, 4)?;
            let mut request = world.request(input.int_in_range(0..=20)?, Vec::new());
            let length = number(input, 9)?;
            for _ in 0..length {
                request.moas.push(Moa {
                    address: moa(number(input, 11)?).octets().into(),
                    priority: input.int_in_range(0..=3)?,
                });
            }
            request.lifetime_s = input.int_in_range(0..=700)?;
            request.time_ms = request
                .time_ms
                .saturating_add_signed(input.arbitrary::<i32>()?.into());
            if input.arbitrary()? {
                request.time_ms = world.now.wall_ms;
            }
            world.send(node, &request.into());
        }
        4 | 5 => {
            let node = number(input, 4)?;
            let wanted = hoa(number(input, 5)?).octets().into();
            world.send(node, &LookupRequest { hoa: wanted }.into());
        }
        6 => {
            let node = number(input, 4)?;
            let length = input.len().min(number(input, 120)?.into());
            let message = input.bytes(length)?.to_vec();
            let key = key(node, 1 + u32::from(number(input, 2)?));
            let hoa = hoa(node).octets();
            let datagram = seal(Keying::Node, hoa, &key, [8; NONCE_BYTES], &message);
            world.ims.handle_datagram(world.now, path(node), &datagram);
        }
        7 => {
            let length = input.len().min(number(input, 120)?.into());
            let datagram = input.bytes(length)?;
            world.ims.handle_datagram(world.now, path(1), datagram);
        }
        8 => {
            let node = number(input, 4)?;
            let generation = input.arbitrary::<Option<u8>>()?.map(Into::into);
            let enrolled = world.ims.enroll(world.now, hoa(node), generation, 1);
            if enrolled.is_ok() {
                let known = world.ims.nodes[&hoa(node).octets()].generation;
                world.generations.insert(node, known);
            }
        }
        9 | 10 => world.store_once(number(input, 4)? > 0),
        11 => world.pass(Duration::from_secs(number(input, 200)?.into())),
        12 => {
            let by = input.int_in_range(-500_000..=500_000)?;
            world.now.wall_ms = world.now.wall_ms.saturating_add_signed(by);
        }
        _ => world.restart(),
    }
    Ok(())
}
