//! The agent's protocol as a state machine without I/O: this module and its submodules use no
//! clock, no socket, no BPF map and no libvirt connection.
//!
//! [`Agent`] takes inputs through its `handle_*` methods and returns [`Output`]s, BPF-map writes
//! included, from [`Agent::poll_output`]. The caller's loop: call one `handle_*`, call
//! `poll_output` until it returns `None`, then sleep until [`Agent::poll_timeout`] or the next
//! input. Extra calls of `handle_timeout` do nothing.
//!
//! A [`Timestamp`] counts nanoseconds of the clock with which the eBPF programs stamp packets, so
//! packet times and timer deadlines are comparable.
//!
//! | module | content |
//! |---|---|
//! | `departure` | outgoing migrations |
//! | `arrival` | incoming migrations: joins, probes, holding and releasing |
//! | [`reception`] | how each watched address is received, and the sessions with relays |
//! | `machines` | dispatch of each input to a state machine |
//! | `context` | state that every state machine shares |
//! | `links` | connections to other agents, and datagrams of the VMs |
//! | `host` | ports and domains, the mirror of the kernel's listeners, the VMs' use of their limits |
//! | `filter` | source filters and their merger |
//! | `querier` | MLD queriers of the links, and the intervals that follow from their Queries |
//! | `policy`, `rate`, `refusal` | who may migrate what, how often, and the refusal texts |
//! | `record` | records of past and present migrations |
//! | `stream` | state of one flow |
//! | `addresses` | unicast addresses that VMs adopt here or leave |
//! | `timer` | deadlines |
//! | `uuid` | UUIDs of domains |
//! | `view` | read-only view for the operator |
//! | [`directory`] | which relay serves which agent: the core of `roamcast mcs` |
//! | [`ims`] | which MoAs a HoA has: the core of `roamcast ims` |
//! | [`relay`] | the relay's protocol: [`relay::RelayServer`] |
//! | `fuzz` | invariants that must hold after any input, for tests |
//! | [`handover`] | which packets the VM received and which it still gets; runs in its own thread |

mod addresses;
mod arrival;
mod config;
mod context;
mod copy;
mod departure;
pub mod directory;
mod filter;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod handover;
mod host;
pub mod ims;
mod io;
mod links;
mod machines;
pub mod policy;
mod querier;
mod rate;
pub mod reception;
mod record;
mod refusal;
pub mod relay;
mod stream;
#[cfg(test)]
mod tests;
mod timer;
mod uuid;
mod view;

use std::net::{Ipv6Addr, SocketAddrV6};

use common::maps::{
    BridgeNumber, Forward, ForwardKey, Managed, ManagedKey, RelayFlow, RelayFlowKey, Translation,
    TranslationKey,
};

pub(crate) use arrival::MDB_RENEWAL_LAST;
pub use arrival::{ReceptionView, WaitingView};
pub use config::{AgentConfig, Dispute, Limits, Peer, RelayTiming, Timing, UnicastTiming};
pub use copy::{Carrier, CopyConfig, CopyTls, CopyWay, Encrypt, InTheClear, NoCopyTls};
pub use host::listeners::ListenerView;
pub use io::*;
pub use policy::{Asker, Policy};
pub use record::{
    ClaimOutcome, Direction, ForwardRecord, MigrationRecord, Outcome, RECORDS, TranslationRecord,
    Ungated, UnicastRecord,
};
pub use stream::Stream;
pub use uuid::{DomainUuid, UuidError};
pub use view::View;

pub use context::Counters;
use machines::Machines;

/// State machine of one agent. The caller owns the clock and all I/O.
#[derive(Debug)]
pub struct Agent {
    machines: Machines,
}

impl Agent {
    /// Creates an agent without any state. `seed` starts the sequence of transaction numbers; two
    /// agents must have different seeds, and so must one agent before and after a restart.
    pub fn new(config: AgentConfig, seed: u64) -> Self {
        Self {
            machines: Machines::new(config, seed),
        }
    }

    /// Handles a datagram of a VM. `port` is the ifindex of the VM's TAP (from `SO_RCVMARK`); a
    /// datagram of an unknown port is only counted.
    pub fn handle_datagram(&mut self, now: Timestamp, port: u32, from: SocketAddrV6, bytes: &[u8]) {
        self.machines
            .input(now, |it| it.on_datagram(port, from, bytes));
    }

    /// Handles an event of the connection to a peer.
    pub fn handle_peer(&mut self, now: Timestamp, peer: &str, event: PeerEvent) {
        self.machines.input(now, |it| it.on_peer(peer, event));
    }

    /// Handles a change of the set of bridge ports.
    pub fn handle_port(&mut self, now: Timestamp, event: PortEvent) {
        self.machines.input(now, |it| it.on_port(event));
    }

    /// Handles an event of the eBPF programs or of the bridge.
    pub fn handle_datapath(&mut self, now: Timestamp, event: DatapathEvent) {
        self.machines.input(now, |it| it.on_datapath(event));
    }

    /// Handles an event of the gates of TAPs.
    pub fn handle_gate(&mut self, now: Timestamp, event: GateEvent) {
        self.machines.input(now, |it| it.on_gate(event));
    }

    /// Handles an event of the hypervisor.
    pub fn handle_hypervisor(&mut self, now: Timestamp, event: HypervisorEvent) {
        self.machines.input(now, |it| it.on_hypervisor(event));
    }

    /// Handles an operator's command. Every [`Output::Reply`] to the command carries the same `id`.
    pub fn handle_command(&mut self, now: Timestamp, id: u64, command: Command) {
        self.machines.input(now, |it| it.on_command(id, command));
    }

    /// Runs all timers that are due at `now`. Calls before [`Self::poll_timeout`] do nothing.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.machines.input(now, |it| {
            while let Some(timer) = it.cx.timers.expire(it.cx.now) {
                it.on_timer(timer);
                it.settle();
            }
        });
    }

    /// Replaces the list of relays with a new, complete result of relay discovery.
    pub fn handle_relays(&mut self, now: Timestamp, candidates: Vec<RelayCandidate>) {
        self.machines.input(now, |it| {
            it.receptions.found(&mut it.cx, candidates);
        });
    }

    /// Adopts the entries of `MANAGED` and `RELAY_FLOWS` that an earlier agent left. Call before
    /// all other inputs.
    pub fn handle_pinned(
        &mut self,
        now: Timestamp,
        managed: Vec<(ManagedKey, Managed)>,
        flows: Vec<(RelayFlowKey, RelayFlow)>,
    ) {
        self.machines
            .input(now, |it| it.receptions.pinned(managed, flows));
    }

    /// Drops the adopted entries that no listener needs. Call once, after the first
    /// [`DatapathEvent::Snapshot`], when all listeners are known.
    pub fn handle_adopted(&mut self, now: Timestamp) {
        self.machines.input(now, |it| {
            for key in it.receptions.adopted(&mut it.cx) {
                it.unmanage_unneeded(key);
            }
        });
    }

    /// Handles an event about a unicast address of a moving VM, on the link of a bridge. Events of
    /// links on which the agent handles no such address do nothing.
    pub fn handle_address(&mut self, now: Timestamp, bridge: BridgeNumber, event: AddressEvent) {
        self.machines.input(now, |it| it.on_address(bridge, event));
    }

    /// Adopts the kernel's entries for packets to VMs that left, from an earlier agent.
    pub fn handle_forwards(&mut self, now: Timestamp, forwards: Vec<(ForwardKey, Forward)>) {
        self.machines.input(now, |it| {
            it.addresses.adopt_forwards(&mut it.cx, forwards);
        });
    }

    /// Adopts the kernel's entries for address translation, from an earlier agent.
    pub fn handle_translations(
        &mut self,
        now: Timestamp,
        translations: Vec<(TranslationKey, Translation)>,
    ) {
        self.machines.input(now, |it| {
            it.addresses.adopt_translations(&mut it.cx, translations);
        });
    }

    /// Records whether QEMU on this host can encrypt memory copies.
    pub fn handle_copy_tls(&mut self, now: Timestamp, copy_tls: CopyTls) {
        self.machines.input(now, |it| it.cx.copy_tls = copy_tls);
    }

    /// Returns the next action for the caller, or `None` if no action is left.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.machines.cx.outputs.pop_front()
    }

    /// Returns the time of the next [`Self::handle_timeout`], or `None` if no timer is armed.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.machines.cx.timers.next()
    }

    /// Changes this agent's address, which arriving VMs learn, and the prefix length in bits.
    pub fn set_address(&mut self, address: Ipv6Addr, prefix_length: u8) {
        self.machines.cx.config.address = address;
        self.machines.cx.config.prefix_length = prefix_length;
    }

    /// Returns the configuration, with the address that [`Self::set_address`] last set.
    pub fn config(&self) -> &AgentConfig {
        &self.machines.cx.config
    }

    /// Returns the state that the operator's commands show.
    pub fn view(&self) -> View<'_> {
        View(&self.machines)
    }
}
