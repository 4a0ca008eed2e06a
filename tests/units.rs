//! Each role does its main job under the restrictions of its systemd unit, and its loop pets
//! systemd's watchdog. The units permit their services only what the documentation promises.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

#[path = "support/agent.rs"]
mod agent;
#[path = "support/host.rs"]
mod host;
#[path = "support/ims.rs"]
mod ims;
#[path = "support/liar.rs"]
mod liar;
#[path = "support/netns.rs"]
mod netns;
#[path = "support/relay_net.rs"]
mod relay_net;
#[path = "support/tap.rs"]
mod tap;

#[path = "units/agents.rs"]
mod agents;
#[path = "units/exposure.rs"]
mod exposure;
#[path = "units/mapping.rs"]
mod mapping;
#[path = "units/relays.rs"]
mod relays;
#[path = "units/restrictions.rs"]
mod restrictions;
#[path = "units/systemd.rs"]
mod systemd;
