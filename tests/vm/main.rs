//! Roamcast with real virtual machines under libvirt and QEMU. Needs root.

mod failures;
mod guest;
mod handover;
mod hook;
mod limits;
mod migration;
mod mobility;
mod queries;
mod refusals;
mod relay;
mod streams;
