//! What the protocol is told once, at its start.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::ManagedKey;
use serde::Deserialize;

use super::addresses::is_in;
use super::copy::CopyConfig;
use super::policy::Policy;

/// Configuration of an [`super::Agent`].
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Name of this agent, as its peers' certificates and configurations know it.
    pub name: String,
    /// The agents that a domain can be sent to.
    pub peers: Vec<Peer>,
    /// Address of this agent that an arriving VM reaches it by.
    pub address: Ipv6Addr,
    /// Length of the prefix of that address, bits, 0 to 128.
    pub prefix_length: u8,
    /// Who may move what, and how much of it.
    pub policy: Policy,
    /// Bounds.
    pub limits: Limits,
    /// How long to wait for what.
    pub timing: Timing,
    /// When relays are asked; `None` where none is configured.
    pub relay: Option<RelayTiming>,
    /// Whether gates make a move lose and double nothing.
    pub handover: bool,
    /// What is done for the unicast addresses of moving VMs.
    pub unicast: UnicastTiming,
    /// How the memory of VMs is copied.
    pub copy: CopyConfig,
}

impl AgentConfig {
    /// Whether an address is one that a VM can have in this agent's prefix.
    pub(super) fn is_on_link(&self, address: Ipv6Addr) -> bool {
        is_in(address, self.address, self.prefix_length) && address != self.address
    }

    /// When relays are asked for an address; `None` if never: they carry no tagged streams.
    pub(super) fn relay_timing(&self, key: &ManagedKey) -> Option<RelayTiming> {
        self.relay.filter(|_| key.vlan == 0)
    }

    /// The agent of that name that a domain can be sent to.
    pub(super) fn peer(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == name)
    }

    /// Names of the agents that a domain can be sent to, for a sentence.
    pub(super) fn peer_names(&self) -> String {
        let names: Vec<_> = self.peers.iter().map(|peer| peer.name.as_str()).collect();
        names.join(", ")
    }
}

/// An agent that a domain can be sent to. The URIs are this host's own knowledge: libvirt runs a
/// command that a connect URI names (`qemu+ext://…?command=`), so none is taken from a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its name, as its certificate has it.
    pub name: String,
    /// libvirt URI by which this host's libvirtd reaches that host.
    pub connect_uri: String,
    /// URI that this host's QEMU sends memory to; empty to let libvirt choose.
    pub migrate_uri: String,
}

/// What is done for the unicast addresses of moving VMs, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnicastTiming {
    /// How long somebody who has an address may take to say so (RFC 4861 §10, `RETRANS_TIMER`).
    pub retransmit: Duration,
    /// How long packets are sent on at most.
    pub forward: Duration,
    /// How long an arrived VM may take to speak from its address.
    pub defence: Duration,
    /// What becomes of a move when somebody says that he has the address.
    pub disputed: Dispute,
}

/// What becomes of a move to an address that somebody else says he has. Anybody on the link can say so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dispute {
    /// It goes on, and its record says so.
    GoOn,
    /// It ends.
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

/// Bounds of what VMs and peers can make the agent keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Listeners taken over for one arriving domain; more are refused one by one.
    pub listeners_per_domain: usize,
    /// Sources taken over for one listener; a listener with more is refused.
    pub sources_per_listener: usize,
    /// Addresses joined by proxy at once, over all domains.
    pub joins: usize,
    /// Of these, for domains of one peer.
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

/// How long to wait for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// How long a multicast tree may take to grow before a probe is decided.
    pub tree_budget: Duration,
    /// How long the source waits for `AgentResponse`, the connection included.
    pub response_timeout: Duration,
    /// How long the source waits at most until the destination has a place for its domain.
    pub place_timeout: Duration,
    /// How long the source waits for the VM's `MigrationReady`.
    pub ready_timeout: Duration,
    /// How long the destination keeps joins for a VM of which nothing more is heard.
    pub unused_join_expiry: Duration,
    /// How long it keeps them after the source's agent is gone while the VM has not begun to come,
    /// and after an abort while it has.
    pub lost_peer_grace: Duration,
    /// For how long the gate of an arriving TAP is closed at most.
    pub gate_max: Duration,
    /// How often the usage of the ports is read.
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

/// When a relay is asked for a stream, and when it is let go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelayTiming {
    /// How long an arriving VM's address may be without a native packet before a relay is asked.
    pub delay: Duration,
    /// How often the flows are looked at.
    pub watch_interval: Duration,
    /// Shortest silence of a flow that counts as one; see [`super::reception`].
    pub silence: Duration,
    /// How long both ways are told apart by fingerprint at a change. Longer than the two ways'
    /// delays differ.
    pub settle: Duration,
    /// How long a stream must come natively without a gap before its relay is let go.
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
