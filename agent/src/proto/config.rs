//! Configuration of the protocol, passed once at the start.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{BridgeNumber, ManagedKey};
use serde::Deserialize;

use super::LinkAddress;
use super::addresses::is_in;
use super::copy::CopyConfig;
use super::policy::Policy;

/// Configuration of an [`super::Agent`].
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Name of this agent, as in its certificate and in the peers' configurations.
    pub name: String,
    /// Agents that a domain can migrate to.
    pub peers: Vec<Peer>,
    /// Address at which an arriving VM reaches this agent.
    pub address: Ipv6Addr,
    /// Prefix length of that address, bits, 0 to 128.
    pub prefix_length: u8,
    /// Bridge on which VMs arrive.
    pub bridge: BridgeNumber,
    /// Permissions and rate limits of migrations.
    pub policy: Policy,
    /// Limits of the state that VMs and peers can create.
    pub limits: Limits,
    /// Timeouts and intervals.
    pub timing: Timing,
    /// Timing of relay reception; `None` without a configured relay.
    pub relay: Option<RelayTiming>,
    /// Whether gates hold packets, so that a migration neither loses nor duplicates any.
    pub handover: bool,
    /// Timing of the handling of moving VMs' unicast addresses.
    pub unicast: UnicastTiming,
    /// Encryption of memory copies.
    pub copy: CopyConfig,
}

impl AgentConfig {
    /// Returns an address on the link on which VMs arrive.
    pub(super) fn here(&self, address: Ipv6Addr) -> LinkAddress {
        LinkAddress {
            bridge: self.bridge,
            address,
        }
    }

    /// Returns true if a VM can have the address in this agent's prefix.
    pub(super) fn is_on_link(&self, address: Ipv6Addr) -> bool {
        is_in(address, self.address, self.prefix_length) && address != self.address
    }

    /// Returns the relay timing of an address; `None` if no relay is asked. Relays carry no tagged
    /// streams.
    pub(super) fn relay_timing(&self, key: &ManagedKey) -> Option<RelayTiming> {
        self.relay.filter(|_| key.vlan == 0)
    }

    /// Returns the peer with that name.
    pub(super) fn peer(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// Returns the names of all peers, for a sentence.
    pub(super) fn peer_names(&self) -> String {
        let names: Vec<_> = self.peers.iter().map(|peer| peer.name.as_str()).collect();
        names.join(", ")
    }
}

/// An agent that a domain can migrate to. The URIs come from this host's configuration, never from a
/// peer: libvirt runs a command that a connect URI names (`qemu+ext://…?command=`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Name of the agent, as in its certificate.
    pub name: String,
    /// libvirt URI at which this host's libvirtd reaches the destination host.
    pub connect_uri: String,
    /// Target URI of QEMU's memory copy; empty to let libvirt choose.
    pub migrate_uri: String,
}

/// Handling of moving VMs' unicast addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnicastTiming {
    /// Time that the owner of an address has to answer (RFC 4861 §10, `RETRANS_TIMER`).
    pub retransmit: Duration,
    /// Maximum duration of forwarding.
    pub forward: Duration,
    /// Time that an arrived VM has to send from its address.
    pub defence: Duration,
    /// Reaction to another node's claim of the address.
    pub disputed: Dispute,
}

/// Reaction to another node's claim of a moving VM's address. Any node on the link can make such a
/// claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dispute {
    /// The migration continues; its record contains the claim.
    GoOn,
    /// The migration is refused.
    Refuse,
}

impl Default for UnicastTiming {
    fn default() -> Self {
        Self {
            retransmit: Duration::from_secs(1),
            forward: Duration::from_secs(60),
            defence: Duration::from_secs(30),
            disputed: Dispute::GoOn,
        }
    }
}

/// Limits of the state that VMs and peers can create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Listeners adopted for one arriving domain; further listeners are refused individually.
    pub listeners_per_domain: usize,
    /// Sources adopted for one listener; a listener with more sources is refused.
    pub sources_per_listener: usize,
    /// Addresses joined by proxy at a time, for all domains together.
    pub joins: usize,
    /// Addresses joined by proxy at a time, for the domains of one peer.
    pub joins_per_peer: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            listeners_per_domain: 2048,
            sources_per_listener: 64,
            joins: 16_384,
            joins_per_peer: 8192,
        }
    }
}

/// Timeouts and intervals of migrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Time that a multicast tree has to grow before a probe is decided.
    pub tree_budget: Duration,
    /// Time that the source host waits for `AgentResponse`, including the connection.
    pub response_timeout: Duration,
    /// Maximum time that the source host waits for a place at the destination host.
    pub place_timeout: Duration,
    /// Time that the source host waits for the VM's `MigrationReady`.
    pub ready_timeout: Duration,
    /// Time that the destination host keeps joins for a VM without further messages.
    pub unused_join_expiry: Duration,
    /// Time that the destination host keeps joins in two cases: after the loss of the source host's
    /// agent before the VM starts to arrive, and after an abort while the VM arrives.
    pub lost_peer_grace: Duration,
    /// Maximum closed time of an arriving TAP's gate.
    pub gate_max: Duration,
    /// Interval of reading the ports' usage.
    pub usage_interval: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            tree_budget: Duration::from_millis(2500),
            response_timeout: Duration::from_secs(15),
            place_timeout: Duration::from_secs(600),
            ready_timeout: Duration::from_secs(30),
            unused_join_expiry: Duration::from_secs(600),
            lost_peer_grace: Duration::from_secs(30),
            gate_max: Duration::from_secs(600),
            usage_interval: Duration::from_secs(10),
        }
    }
}

/// Timing of relay reception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayTiming {
    /// Time without a native packet for an arriving VM's address before a relay is asked.
    pub delay: Duration,
    /// Interval of reading the flows.
    pub watch_interval: Duration,
    /// Shortest silence of a flow that counts; see [`super::reception`].
    pub silence: Duration,
    /// Time during which both paths are told apart by fingerprint after a change; longer than the
    /// difference of the paths' delays.
    pub settle: Duration,
    /// Time that a stream must arrive natively without a gap before its relay is released.
    pub hold: Duration,
}

impl Default for RelayTiming {
    fn default() -> Self {
        Self {
            delay: Duration::from_millis(20),
            watch_interval: Duration::from_millis(50),
            silence: Duration::from_millis(200),
            settle: Duration::from_millis(300),
            hold: Duration::from_millis(3000),
        }
    }
}
