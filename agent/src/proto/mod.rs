//! The agent's protocol without I/O: no clock, no socket, no BPF map, no libvirt below this module.
//!
//! [`Agent`] takes inputs by `handle_*` methods and gives [`Output`]s, BPF-map writes included,
//! from [`Agent::poll_output`]. The order for the caller is: one `handle_*`, then `poll_output`
//! until it is empty, then sleep until [`Agent::poll_timeout`] or the next input. Extra calls of
//! `handle_timeout` do nothing.
//!
//! Time is [`Timestamp`], nanoseconds of the clock that the kernel programs stamp with, so a
//! packet's time and a timer's compare.
//!
//! | module | holds |
//! |---|---|
//! | `departure` | migrations that leave |
//! | `arrival` | migrations that arrive: joins, probes, holding and releasing |
//! | [`reception`] | how each watched address is received, and the sessions with relays |
//! | `machines` | which machine each input goes to |
//! | `context` | what every machine is lent |
//! | `links` | connections to other agents, and datagrams of the VMs |
//! | `host` | ports and domains, the mirror of the kernel's listeners, what VMs have used of their limits |
//! | `filter` | source filters and their merger |
//! | `querier` | MLD queriers of the links, and the intervals that follow from them |
//! | `policy`, `rate`, `refusal` | who may move what, how often, and the sentences for those who may not |
//! | `record` | what is remembered of each migration |
//! | `stream` | what is known of one flow |
//! | `addresses` | addresses that VMs take on here, or leave |
//! | `timer` | deadlines |
//! | `uuid` | names of domains |
//! | `view` | what the operator sees |
//! | [`directory`] | which relay is for whom: the core of `roamcast mcs` |
//! | [`ims`] | which MoAs a HoA has: the core of `roamcast ims` |
//! | [`relay`] | the other role: [`relay::RelayServer`] |
//! | `fuzz` | what must hold whatever happens, for tests |
//! | [`handover`] | which packets the VM has had, and which it gets; driven by its own thread |

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
    Forward, ForwardKey, Managed, ManagedKey, RelayFlow, RelayFlowKey, Translation, TranslationKey,
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

/// The protocol of one agent.
#[derive(Debug)]
pub struct Agent {
    machines: Machines,
}

impl Agent {
    /// Creates an agent that knows nothing yet. `seed` makes its transaction numbers; two agents,
    /// and one agent before and after a restart, must have different ones.
    pub fn new(config: AgentConfig, seed: u64) -> Self {
        Self {
            machines: Machines::new(config, seed),
        }
    }

    /// Takes in a datagram that came in by `port` (its `SO_RCVMARK`), if by any.
    pub fn handle_datagram(&mut self, now: Timestamp, port: u32, from: SocketAddrV6, bytes: &[u8]) {
        self.machines
            .input(now, |it| it.on_datagram(port, from, bytes));
    }

    /// Takes in what happened on the connection to a peer.
    pub fn handle_peer(&mut self, now: Timestamp, peer: &str, event: PeerEvent) {
        self.machines.input(now, |it| it.on_peer(peer, event));
    }

    /// Takes in a change of the bridge's ports.
    pub fn handle_port(&mut self, now: Timestamp, event: PortEvent) {
        self.machines.input(now, |it| it.on_port(event));
    }

    /// Takes in what the kernel programs and the bridge report.
    pub fn handle_datapath(&mut self, now: Timestamp, event: DatapathEvent) {
        self.machines.input(now, |it| it.on_datapath(event));
    }

    /// Takes in what becomes of the gates.
    pub fn handle_gate(&mut self, now: Timestamp, event: GateEvent) {
        self.machines.input(now, |it| it.on_gate(event));
    }

    /// Takes in what the hypervisor reports.
    pub fn handle_hypervisor(&mut self, now: Timestamp, event: HypervisorEvent) {
        self.machines.input(now, |it| it.on_hypervisor(event));
    }

    /// Takes in an operator's command; `id` is repeated in every [`Output::Reply`] to it.
    pub fn handle_command(&mut self, now: Timestamp, id: u64, command: Command) {
        self.machines.input(now, |it| it.on_command(id, command));
    }

    /// Does what is due at `now`. Calls before [`Self::poll_timeout`] do nothing.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.machines.input(now, |it| {
            while let Some(timer) = it.cx.timers.expire(it.cx.now) {
                it.on_timer(timer);
                it.settle();
            }
        });
    }

    /// Takes in the relays that discovery has found, all of them each time.
    pub fn handle_relays(&mut self, now: Timestamp, candidates: Vec<RelayCandidate>) {
        self.machines.input(now, |it| {
            it.receptions.found(&mut it.cx, candidates);
        });
    }

    /// Takes in, before everything else, what an agent before this one has left in `MANAGED` and
    /// `RELAY_FLOWS`.
    pub fn handle_pinned(
        &mut self,
        now: Timestamp,
        managed: Vec<(ManagedKey, Managed)>,
        flows: Vec<(RelayFlowKey, RelayFlow)>,
    ) {
        self.machines
            .input(now, |it| it.receptions.pinned(managed, flows));
    }

    /// Takes in, once and after the first [`DatapathEvent::Snapshot`], that all listeners are known:
    /// what was pinned and nobody needs is given up.
    pub fn handle_adopted(&mut self, now: Timestamp) {
        self.machines.input(now, |it| {
            for key in it.receptions.adopted(&mut it.cx) {
                it.unmanage_unneeded(key);
            }
        });
    }

    /// Takes in what has happened about a unicast address.
    pub fn handle_address(&mut self, now: Timestamp, event: AddressEvent) {
        self.machines.input(now, |it| it.on_address(event));
    }

    /// Takes over what an agent before this one sends on in the kernel.
    pub fn handle_forwards(&mut self, now: Timestamp, forwards: Vec<(ForwardKey, Forward)>) {
        self.machines.input(now, |it| {
            it.addresses.adopt_forwards(&mut it.cx, forwards);
        });
    }

    /// Takes over what an agent before this one translates in the kernel.
    pub fn handle_translations(
        &mut self,
        now: Timestamp,
        translations: Vec<(TranslationKey, Translation)>,
    ) {
        self.machines.input(now, |it| {
            it.addresses.adopt_translations(&mut it.cx, translations);
        });
    }

    /// Takes in whether QEMU can encrypt copies here.
    pub fn handle_copy_tls(&mut self, now: Timestamp, copy_tls: CopyTls) {
        self.machines.input(now, |it| it.cx.copy_tls = copy_tls);
    }

    /// Returns the next thing to do; `None` when nothing is left.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.machines.cx.outputs.pop_front()
    }

    /// Returns when to call [`Self::handle_timeout`], if ever.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.machines.cx.timers.next()
    }

    /// Changes the address by which arriving VMs reach this agent, and its prefix (bits).
    pub fn set_address(&mut self, address: Ipv6Addr, prefix_length: u8) {
        self.machines.cx.config.address = address;
        self.machines.cx.config.prefix_length = prefix_length;
    }

    /// The configuration.
    pub fn config(&self) -> &AgentConfig {
        &self.machines.cx.config
    }

    /// What the operator may see of it.
    pub fn view(&self) -> View<'_> {
        View(&self.machines)
    }
}
