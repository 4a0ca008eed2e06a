//! This host: what it has, and what its VMs listen to.

pub(super) mod inventory;
pub(super) mod listeners;
pub(super) mod usage;
mod watch;
