//! Two agents on a virtual clock, and shared parts of the tests.

mod crash;
pub(super) mod fixture;
mod kernel;
mod migration;
mod pair;
mod relay_network;
pub(super) mod relay_world;
mod schedule;
mod unicast;
mod vm_host;
