//! Communication partners of the agent: other agents and relays over connections, VMs over datagrams.

pub(super) mod peers;
pub(super) mod vm;
