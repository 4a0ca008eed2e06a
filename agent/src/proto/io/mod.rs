//! Inputs and outputs of the protocol state machine.
//!
//! Events and commands go in, [`Output`]s come out. The types carry no sockets and no file descriptors,
//! so tests and fuzzers drive the protocol without a kernel.

mod event;
mod output;

use std::fmt::{self, Display, Formatter};
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::maps::BridgeNumber;

use super::DomainUuid;
pub use super::addresses::{
    AddressCommand, AddressEvent, ForwardCommand, Leave, Said, TranslateCommand,
};
pub use crate::value::Timestamp;
pub use event::*;
pub use output::*;

/// Returns the milliseconds of a duration, the unit of times in messages.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// MAC of an Ethernet interface, in wire order.
pub type Mac = [u8; 6];

/// Formats an Ethernet address for a person: `52:54:00:00:00:01`.
pub fn mac_text(mac: &Mac) -> String {
    let [a, b, c, d, e, f] = mac;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// Address of a VM that sends datagrams to its agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmAddress {
    /// Bridge of the TAP that received the VM's datagram.
    pub bridge: BridgeNumber,
    /// Link-local address and port of the VM.
    pub socket: SocketAddrV6,
}

/// A unicast address on the link of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LinkAddress {
    /// Bridge of the link.
    pub bridge: BridgeNumber,
    /// Address of a node on the link.
    pub address: Ipv6Addr,
}

impl Display for LinkAddress {
    /// Writes the address alone, as people know the node.
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

/// A libvirt domain, reduced to what the protocol needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// UUID that libvirt assigned; a migration keeps it.
    pub uuid: DomainUuid,
    /// libvirt's name for the domain, for operators and policy rules.
    pub name: String,
    /// Whether the domain's CPUs run on this host now.
    pub running: bool,
    /// Bridged NICs of the domain.
    pub interfaces: Vec<DomainInterface>,
}

/// One bridged NIC of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainInterface {
    /// TAP on this host (`vnet0`); empty while the NIC has none.
    pub target_dev: String,
    /// MAC of the guest's NIC.
    pub mac: Mac,
    /// Whether the kernel reads the TAP (vhost-net) instead of the hypervisor.
    pub vhost: bool,
}

/// A TAP that is a port of a managed bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Bridge of the TAP.
    pub bridge: BridgeNumber,
    /// Interface index of the TAP.
    pub ifindex: u32,
    /// Interface name (`vnet0`).
    pub name: String,
    /// MAC of the TAP itself. libvirt gives a TAP the guest's MAC with the first byte `fe`.
    pub mac: Mac,
}
