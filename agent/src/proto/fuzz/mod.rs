//! Fuzz targets of the state machines.
//!
//! Input bytes choose the next event from a small world in which events interact. The invariants are
//! checked after each event and at the end.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what fails here is what is looked for"
)]

mod adoption;
mod input;
pub(super) mod kernel;
mod message;
mod world;

use std::time::Duration;

use arbitrary::{Result, Unstructured};
use common::maps::BridgeNumber;

use self::world::World;
pub(crate) use super::handover::fuzz::{hold, placement, segments, unread};
use super::{
    AgentConfig, Carrier, CopyConfig, Dispute, Encrypt, HypervisorEvent, Limits, Peer, Policy,
    RelayTiming, Timing, UnicastTiming,
};

/// Maximum number of inputs.
const INPUTS: usize = 200;

/// Runs an agent on fuzzed inputs, and checks that nothing is left at the end.
pub(crate) fn agent(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok(config) = config(&mut input) else {
        return;
    };
    let mut world = World::new(config);
    world.hypervisor(HypervisorEvent::Connected);
    for _ in 0..INPUTS {
        if input.is_empty() || input::next(&mut input, &mut world).is_err() {
            break;
        }
    }
    world.end();
}

/// Runs an agent that finds arbitrary map entries of an earlier agent.
pub(crate) fn adoption(bytes: &[u8]) {
    let mut input = Unstructured::new(bytes);
    let Ok(config) = config(&mut input) else {
        return;
    };
    let mut world = World::new(config);
    // Entries without input bytes are absent.
    let _ = adoption::run(&mut input, &mut world);
    world.hypervisor(HypervisorEvent::Connected);
    adoption::live_on(&mut input, &mut world);
    world.end();
}

/// Runs a relay on fuzzed inputs.
pub(crate) fn relay(bytes: &[u8]) {
    super::relay::tests::fuzz::run(bytes);
}

/// Runs a relay that finds arbitrary map entries of an earlier relay.
pub(crate) fn relay_adoption(bytes: &[u8]) {
    super::relay::tests::fuzz::adoption(bytes);
}

/// Runs a mapping server on fuzzed inputs.
pub(crate) fn ims(bytes: &[u8]) {
    super::ims::tests::fuzz::run(bytes);
}

/// Runs a migration control server on fuzzed inputs.
pub(crate) fn directory(bytes: &[u8]) {
    super::directory::fuzz::run(bytes);
}

/// Number of the agent's bridge.
const BRIDGE: BridgeNumber = BridgeNumber(3);

/// Returns a configuration with short times and tight limits, so that the inputs reach them.
fn config(input: &mut Unstructured<'_>) -> Result<AgentConfig> {
    let peer = |name: &str| Peer {
        name: name.to_owned(),
        connect_uri: format!("qemu+tcp://{name}/system"),
        migrate_uri: String::new(),
    };
    Ok(AgentConfig {
        name: "vms1".to_owned(),
        peers: vec![peer("vms2"), peer("vms3")],
        address: [0x20, 1, 0xd, 0xb8, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10].into(),
        prefix_length: 64,
        bridge: BRIDGE,
        policy: Policy::allow_all(),
        limits: Limits {
            listeners_per_domain: 3,
            sources_per_listener: 3,
            joins: 5,
            joins_per_peer: 4,
        },
        timing: Timing {
            gate_max: Duration::from_secs(60),
            unused_join_expiry: Duration::from_secs(60),
            place_timeout: Duration::from_secs(60),
            usage_interval: Duration::from_secs(1000),
            ..Timing::default()
        },
        relay: input.arbitrary::<bool>()?.then(|| RelayTiming {
            watch_interval: Duration::from_secs(1),
            ..RelayTiming::default()
        }),
        handover: input.arbitrary()?,
        unicast: UnicastTiming {
            disputed: *input.choose(&[Dispute::GoOn, Dispute::Refuse])?,
            ..UnicastTiming::default()
        },
        copy: CopyConfig {
            encrypt: *input.choose(&[Encrypt::Auto, Encrypt::Always, Encrypt::Never])?,
            carrier: Carrier::Plain,
        },
    })
}
