//! Adoption of arbitrary map entries, as a faulty version, corrupted memory, or an agent killed between
//! two writes may leave them.

use std::collections::BTreeMap;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use common::maps::{
    Address, BridgeNumber, Forward, ForwardKey, Managed, ManagedKey, Origins, RelayFlow,
    RelayFlowKey, StreamKey, Translation, TranslationKey,
};
use common::relay::{FIRST_PORT, FIRST_RELAY_PORT};

use super::input;
use super::message::{key, list, number, unicast, uuid};
use super::world::World;
use crate::proto::*;

/// Limit of entries per map.
const ENTRIES: u8 = 6;
/// Maximum number of inputs after the adoption.
const INPUTS: usize = 100;

/// Fills the maps, and starts the agent as the program does.
pub(super) fn run(input: &mut Unstructured<'_>, world: &mut World) -> Result<()> {
    let now = world.now;
    let managed = map(input, managed)?;
    let flows = map(input, relay_flow)?;
    let forwards = map(input, |input| forward(input, now))?;
    let translations = map(input, |input| translation(input, now))?;
    let kernel = &mut world.kernel;
    kernel.managed.extend(managed.iter().map(|it| it.0));
    kernel.flows.extend(flows.iter().map(|it| it.0));
    let on = |bridge, address: Address| LinkAddress {
        bridge,
        address: address.into(),
    };
    let left = forwards.iter().map(|it| on(it.0.bridge, it.0.address));
    kernel.forwards.extend(left);
    let translated = translations
        .iter()
        .map(|(key, _)| (key.ifindex, on(key.bridge, key.address)));
    kernel.translations.extend(translated);
    world.input(|agent, now| agent.handle_pinned(now, managed, flows));
    world.input(|agent, now| agent.handle_forwards(now, forwards));
    world.input(|agent, now| agent.handle_translations(now, translations));
    let before = number(input, 20)?;
    for _ in 0..before {
        input::next(input, world)?;
    }
    input::snapshot(input, world)
}

/// Returns the entries of a map, without duplicate keys.
fn map<K: Ord, V>(
    input: &mut Unstructured<'_>,
    one: impl FnMut(&mut Unstructured<'_>) -> Result<(K, V)>,
) -> Result<Vec<(K, V)>> {
    let entries: BTreeMap<K, V> = list(input, ENTRIES, one)?.into_iter().collect();
    Ok(entries.into_iter().collect())
}

/// Continues with inputs after unneeded entries are removed.
pub(super) fn live_on(input: &mut Unstructured<'_>, world: &mut World) {
    world.input(Agent::handle_adopted);
    for _ in 0..INPUTS {
        if input.is_empty() || input::next(input, world).is_err() {
            break;
        }
    }
}

/// Returns an address of the small world, or any.
fn address(input: &mut Unstructured<'_>) -> Result<Address> {
    match number(input, 3)? {
        0 => input.arbitrary(),
        _ => Ok(unicast(input)?.octets()),
    }
}

/// Returns a number near another, or any.
fn near(input: &mut Unstructured<'_>, number: u16) -> Result<u16> {
    match input.arbitrary::<u8>()? {
        0 => input.arbitrary(),
        offset => Ok(number.wrapping_add(u16::from(offset & 3))),
    }
}

fn time(input: &mut Unstructured<'_>, now: Timestamp) -> Result<u64> {
    Ok(match number(input, 7)? {
        0 => input.arbitrary()?,
        1 => 0,
        2 => u64::MAX,
        _ => (now + Duration::from_millis(input.arbitrary::<u16>()?.into())).0,
    })
}

fn managed_key(input: &mut Unstructured<'_>) -> Result<ManagedKey> {
    match number(input, 7)? {
        0 => Ok(ManagedKey {
            vlan: input.arbitrary()?,
            bridge: BridgeNumber(input.arbitrary()?),
            multicast_address: input.arbitrary()?,
        }),
        _ => key(input),
    }
}

fn managed(input: &mut Unstructured<'_>) -> Result<(ManagedKey, Managed)> {
    let key = managed_key(input)?;
    let origins = match number(input, 3)? {
        0 => input.arbitrary()?,
        1 => Origins::Both as u8,
        _ => Origins::Relay as u8,
    };
    let value = Managed {
        watch_since_ns: input.arbitrary()?,
        origins,
        ..Managed::new(0, Origins::Native, 0)
    };
    Ok((key, value))
}

fn relay_flow(input: &mut Unstructured<'_>) -> Result<(RelayFlowKey, RelayFlow)> {
    let managed = managed_key(input)?;
    let key = RelayFlowKey {
        relay_address: address(input)?,
        relay_port: near(input, FIRST_RELAY_PORT)?,
        agent_port: near(input, FIRST_PORT)?,
    };
    let value = RelayFlow {
        session: input.arbitrary::<u8>()?.into(),
        stream: StreamKey {
            multicast_address: managed.multicast_address,
            source: address(input)?,
            source_port: near(input, 5004)?,
            destination_port: near(input, 0)?,
            vlan: managed.vlan,
            bridge: managed.bridge,
        },
        agent_address: address(input)?,
        address_difference: input.arbitrary()?,
        pad: input.arbitrary()?,
    };
    Ok((key, value))
}

fn forward(input: &mut Unstructured<'_>, now: Timestamp) -> Result<(ForwardKey, Forward)> {
    let key = ForwardKey {
        address: address(input)?,
        vlan: number(input, 7)?.saturating_sub(6).into(),
        bridge: BridgeNumber(input.arbitrary()?),
    };
    let value = Forward {
        until_ns: time(input, now)?,
        unread_until_ns: time(input, now)?,
        destination: address(input)?,
        difference: input.arbitrary()?,
        bridge: input.arbitrary()?,
        ifindex: 10 + u32::from(number(input, 3)?),
        domain_uuid: uuid(input)?.0,
        ..Forward::default()
    };
    Ok((key, value))
}

fn translation(
    input: &mut Unstructured<'_>,
    now: Timestamp,
) -> Result<(TranslationKey, Translation)> {
    let key = TranslationKey {
        address: address(input)?,
        ifindex: 10 + u32::from(number(input, 4)?),
        vlan: number(input, 7)?.saturating_sub(6).into(),
        bridge: BridgeNumber(input.arbitrary()?),
    };
    let value = Translation {
        until_ns: time(input, now)?,
        source: address(input)?,
        difference: input.arbitrary()?,
        domain_uuid: uuid(input)?.0,
        ..Translation::default()
    };
    Ok((key, value))
}
