//! Who the agent speaks with: other agents and relays by connections, the VMs by datagrams.

pub(super) mod peers;
pub(super) mod vm;
