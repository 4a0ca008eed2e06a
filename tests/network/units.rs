//! Each role does its main job under the restrictions of its systemd unit, and its loop pets
//! systemd's watchdog. The units permit their services only what the documentation promises.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

mod agents;
mod exposure;
mod mapping;
mod relays;
mod restrictions;
mod systemd;
