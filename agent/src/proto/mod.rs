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
//! | `links::vm` | datagrams of the VMs: who asks, how often, and what was answered |
//! | `departure` | migrations that leave |
//! | `destination` | migrations that arrive: joins, probes, holding and releasing |
//! | [`reception`] | how each watched address is received, and the sessions with relays |
//! | `context` | what every machine is lent |
//! | `links::peers` | connections to other agents |
//! | `host::listeners` | mirror of the kernel's listeners, and their ageing |
//! | `host::watch` | what the kernel reports |
//! | `host::usage` | what VMs have used of their limits |
//! | `host::inventory` | ports and domains |
//! | `filter` | source filters and their merger |
//! | `querier` | MLD queriers of the links, and the intervals that follow from them |
//! | `policy`, `rate`, `refusal` | who may move what, how often, and the sentences for those who may not |
//! | `record` | what is remembered of each migration |
//! | `stream` | what is known of one flow |
//! | `addresses` | addresses that VMs take on here, or leave |
//! | `timer` | deadlines |
//! | `uuid` | names of domains |
//! | [`directory`] | which relay is for whom: the core of `roamcast mcs` |
//! | [`ims`] | which MoAs a HoA has: the core of `roamcast ims` |
//! | [`relay`] | the other role: [`relay::RelayServer`] |
//! | `fuzz` | what must hold whatever happens, for tests |
//! | [`handover`] | which packets the VM has had, and which it gets; driven by its own thread |

mod addresses;
mod config;
mod context;
mod copy;
mod departure;
mod destination;
pub mod directory;
mod filter;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod handover;
mod host;
pub mod ims;
mod io;
mod links;
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

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::maps::{
    Forward, ForwardKey, Managed, ManagedKey, PortUsage, Querier, QuerierKey, RelayFlow,
    RelayFlowKey, Translation, TranslationKey,
};

pub use config::{AgentConfig, Dispute, Limits, Peer, RelayTiming, Timing, UnicastTiming};
pub use copy::{Carrier, CopyConfig, CopyTls, CopyWay, Encrypt, InTheClear, NoCopyTls};
pub(crate) use destination::MDB_RENEWAL_LAST;
pub use destination::{ReceptionView, WaitingView};
pub use host::listeners::ListenerView;
pub use io::*;
pub use policy::{Asker, Policy};
pub use record::{
    ClaimOutcome, Direction, ForwardRecord, MigrationRecord, Outcome, RECORDS, TranslationRecord,
    Ungated, UnicastRecord,
};
pub use stream::Stream;
pub use uuid::{DomainUuid, UuidError};

use addresses::{Addresses, Holder};
use context::Context;
use departure::{Around, Departures};
use destination::{Arrivals, Entry, Incoming, Preparations, Queue, claimant};
use filter::Filter;
use host::inventory::{self, Inventory};
use host::listeners::{self as listener, Mirror};
use host::usage::Usage;
use rate::Rates;
use reception::{Changed, ModeView, Receptions, RelayView, SessionView};
use timer::Timer;

/// Datagrams and frames that were not acted upon, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams of a port that the bridge does not have (any more).
    pub unknown_port_datagrams: u64,
    /// Datagrams of a port behind which there is no domain.
    pub unhoused_datagrams: u64,
    /// Datagrams whose sender is not a link-local address.
    pub off_link_datagrams: u64,
    /// Datagrams that are no message, or none that a VM sends.
    pub malformed_datagrams: u64,
    /// Frames of peers that are no message.
    pub malformed_frames: u64,
    /// Announcements of relays that cannot be true; each has ended a session.
    pub relay_lies: u64,
    /// Sessions that a relay has refused or ended.
    pub relay_refusals: u64,
    /// Relays asked to take over from another.
    pub relay_failovers: u64,
    /// Addresses that arriving VMs cannot have.
    pub claims_refused: u64,
    /// Addresses that arrived VMs have never spoken from.
    pub claims_silent: u64,
    /// Addresses of moving VMs that somebody else has too.
    pub addresses_disputed: u64,
    /// Addresses that a VM is not believed to be its own; nothing is sent on for them.
    pub forwards_refused: u64,
}

/// The protocol of one agent.
#[derive(Debug)]
pub struct Agent {
    cx: Context,
    /// Time of the first input.
    started: Option<Timestamp>,
    inventory: Inventory,
    mirror: Mirror,
    departures: Departures,
    incoming: BTreeMap<u64, Incoming>,
    arrivals: Arrivals,
    preparations: Preparations,
    /// Requests that wait for a place.
    queue: Queue,
    /// What peers may still ask for within a minute.
    rates: Rates,
    entries: BTreeMap<ManagedKey, Entry>,
    receptions: Receptions,
    usage: Usage,
    addresses: Addresses,
}

impl Agent {
    /// Creates an agent that knows nothing yet. `seed` makes its transaction numbers; two agents,
    /// and one agent before and after a restart, must have different ones.
    pub fn new(config: AgentConfig, seed: u64) -> Self {
        Self {
            cx: Context::new(config, seed),
            started: None,
            inventory: Inventory::default(),
            mirror: Mirror::default(),
            departures: Departures::default(),
            incoming: BTreeMap::new(),
            arrivals: Arrivals::default(),
            preparations: Preparations::default(),
            queue: Queue::default(),
            rates: Rates::default(),
            entries: BTreeMap::new(),
            receptions: Receptions::default(),
            usage: Usage::default(),
            addresses: Addresses::default(),
        }
    }

    /// Takes in a datagram that came in by `port` (its `SO_RCVMARK`), if by any.
    pub fn handle_datagram(&mut self, now: Timestamp, port: u32, from: SocketAddrV6, bytes: &[u8]) {
        self.begin(now);
        self.on_datagram(port, from, bytes);
        self.end();
    }

    /// Takes in what happened on the connection to a peer.
    pub fn handle_peer(&mut self, now: Timestamp, peer: &str, event: PeerEvent) {
        self.begin(now);
        self.on_peer(peer, event);
        self.end();
    }

    /// Takes in a change of the bridge's ports.
    pub fn handle_port(&mut self, now: Timestamp, event: PortEvent) {
        self.begin(now);
        match event {
            PortEvent::Added(port) => {
                self.inventory.ports.insert(port.ifindex, port);
                self.ports_changed();
            }
            PortEvent::Removed { ifindex } => {
                self.inventory.ports.remove(&ifindex);
                self.usage.forget_port(ifindex);
                self.forget_listeners(ifindex);
                self.addresses
                    .end_translations(&mut self.cx, |(by, _), _| *by == ifindex);
                self.ports_changed();
                self.arrivals_cut_off();
            }
        }
        self.end();
    }

    /// Takes in what the kernel programs and the bridge report.
    pub fn handle_datapath(&mut self, now: Timestamp, event: DatapathEvent) {
        self.begin(now);
        self.on_datapath(event);
        self.end();
    }

    /// Takes in what becomes of the gates.
    pub fn handle_gate(&mut self, now: Timestamp, event: GateEvent) {
        self.begin(now);
        match event {
            GateEvent::Cut { ifindex, cut } => {
                self.departures.cut_placed(&mut self.cx, ifindex, cut)
            }
            GateEvent::Opened { ifindex, report } => self.gate_opened(ifindex, report),
            GateEvent::SentOn { migration, report } => {
                self.cx
                    .records
                    .update(migration, |record| record.sent_on(report));
            }
            GateEvent::RunsOn {
                migration,
                thrown_away_at_most,
            } => self.cx.records.update(migration, |record| {
                record.thrown_away_at_most = record
                    .thrown_away_at_most
                    .saturating_add(thrown_away_at_most);
            }),
            GateEvent::NotRecorded { ifindex } => {
                self.departures.not_recorded(&mut self.cx, ifindex);
            }
            GateEvent::NotHeld { ifindex } => self.not_held(ifindex, Ungated::NotMade),
        }
        self.end();
    }

    /// Takes in what the hypervisor reports.
    pub fn handle_hypervisor(&mut self, now: Timestamp, event: HypervisorEvent) {
        self.begin(now);
        self.on_hypervisor(event);
        self.end();
    }

    /// Takes in an operator's command; `id` is repeated in every [`Output::Reply`] to it.
    pub fn handle_command(&mut self, now: Timestamp, id: u64, command: Command) {
        self.begin(now);
        match command {
            Command::Migrate {
                domain,
                destination,
            } => {
                let (departures, cx, around) = self.departing();
                departures.command_migrate(cx, around, id, &domain, &destination);
            }
            Command::Abort { domain } => {
                let addresses = &mut self.addresses;
                self.departures
                    .command_abort(&mut self.cx, addresses, id, &domain);
            }
            Command::Prepare {
                uuid,
                domain,
                source,
            } => self.command_prepare(id, uuid, &domain, &source),
        }
        self.end();
    }

    /// Does what is due at `now`. Calls before [`Self::poll_timeout`] do nothing.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.begin(now);
        while let Some(timer) = self.cx.timers.expire(self.cx.now) {
            self.on_timer(timer);
            self.settle();
        }
        self.end();
    }

    /// Takes in the relays that discovery has found, all of them each time.
    pub fn handle_relays(&mut self, now: Timestamp, candidates: Vec<RelayCandidate>) {
        self.begin(now);
        self.receptions.found(&mut self.cx, candidates);
        self.end();
    }

    /// Takes in, before everything else, what an agent before this one has left in `MANAGED` and
    /// `RELAY_FLOWS`.
    pub fn handle_pinned(
        &mut self,
        now: Timestamp,
        managed: Vec<(ManagedKey, Managed)>,
        flows: Vec<(RelayFlowKey, RelayFlow)>,
    ) {
        self.begin(now);
        self.receptions.pinned(managed, flows);
        self.end();
    }

    /// Takes in, once and after the first [`DatapathEvent::Snapshot`], that all listeners are known:
    /// what was pinned and nobody needs is given up.
    pub fn handle_adopted(&mut self, now: Timestamp) {
        self.begin(now);
        for key in self.receptions.adopted(&mut self.cx) {
            self.unmanage_unneeded(key);
        }
        self.end();
    }

    /// Takes in what has happened about a unicast address.
    pub fn handle_address(&mut self, now: Timestamp, event: AddressEvent) {
        self.begin(now);
        match event {
            AddressEvent::Heard { address, said, by } => {
                self.claim_heard(address, said, by);
                let disputed = self.addresses.departure_heard(
                    &mut self.cx,
                    &self.inventory,
                    address,
                    said,
                    by,
                );
                if let Some(number) = disputed {
                    self.departures
                        .claim_anew(&mut self.cx, &self.addresses, number);
                }
            }
            AddressEvent::Own { address } => {
                self.claim_of_own(address);
                self.addresses.departure_of_own(&mut self.cx, address);
            }
            AddressEvent::Spoke { address } => self.claim_spoken(address),
            AddressEvent::Forwarded {
                address,
                packets,
                bytes,
                dropped,
            } => {
                let counts = [packets, bytes, dropped];
                self.cx.records.count_forwarded(address, counts);
            }
            AddressEvent::Translated {
                ifindex,
                address,
                packets,
                bytes,
                dropped,
            } => {
                let counts = [packets, bytes, dropped];
                self.cx.records.count_translated(ifindex, address, counts);
            }
        }
        self.end();
    }

    /// Takes over what an agent before this one sends on in the kernel.
    pub fn handle_forwards(&mut self, now: Timestamp, forwards: Vec<(ForwardKey, Forward)>) {
        self.begin(now);
        self.addresses.adopt_forwards(&mut self.cx, forwards);
        self.end();
    }

    /// Takes over what an agent before this one translates in the kernel.
    pub fn handle_translations(
        &mut self,
        now: Timestamp,
        translations: Vec<(TranslationKey, Translation)>,
    ) {
        self.begin(now);
        self.addresses
            .adopt_translations(&mut self.cx, translations);
        self.end();
    }

    /// Takes in whether QEMU can encrypt copies here.
    pub fn handle_copy_tls(&mut self, now: Timestamp, copy_tls: CopyTls) {
        self.begin(now);
        self.cx.copy_tls = copy_tls;
        self.end();
    }

    /// Returns the next thing to do; `None` when nothing is left.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.cx.outputs.pop_front()
    }

    /// Returns when to call [`Self::handle_timeout`], if ever.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        self.cx.timers.next()
    }

    /// Changes the address by which arriving VMs reach this agent, and its prefix (bits).
    pub fn set_address(&mut self, address: Ipv6Addr, prefix_length: u8) {
        self.cx.config.address = address;
        self.cx.config.prefix_length = prefix_length;
    }

    /// The configuration.
    pub fn config(&self) -> &AgentConfig {
        &self.cx.config
    }

    /// All listeners of all ports.
    pub fn listeners(&self) -> impl Iterator<Item = ListenerView<'_>> {
        self.mirror.iter()
    }

    /// The listeners of one port.
    pub fn listeners_of_port(&self, ifindex: u32) -> impl Iterator<Item = ListenerView<'_>> {
        self.mirror.of_port(ifindex)
    }

    /// The addresses joined by proxy.
    pub fn receptions(&self) -> impl Iterator<Item = ReceptionView<'_>> {
        self.reception_views()
    }

    /// How each watched address is received.
    pub fn modes(&self) -> impl Iterator<Item = ModeView> {
        self.receptions.modes(self.cx.now)
    }

    /// The relays that discovery has found.
    pub fn relays(&self) -> impl Iterator<Item = RelayView<'_>> {
        self.receptions.relays(&self.cx)
    }

    /// Whether a peer is a relay.
    pub fn is_relay(&self, name: &str) -> bool {
        self.receptions.is_relay(name)
    }

    /// The sessions with relays.
    pub fn relay_sessions(&self) -> impl Iterator<Item = SessionView<'_>> {
        self.receptions.sessions(self.cx.now)
    }

    /// The last migrations, oldest first, running ones included.
    pub fn migrations(&self) -> impl Iterator<Item = &MigrationRecord> {
        self.cx.records.iter()
    }

    /// One of them, by its number.
    pub fn migration(&self, number: u64) -> Option<&MigrationRecord> {
        self.cx.records.get(number)
    }

    /// The last usage read of a port.
    pub fn usage_of_port(&self, ifindex: u32) -> Option<&PortUsage> {
        self.usage.of_port(ifindex)
    }

    /// Whether QEMU can encrypt copies here, and if not why.
    pub fn copy_tls(&self) -> &CopyTls {
        &self.cx.copy_tls
    }

    /// The domains of this host.
    pub fn domains(&self) -> impl Iterator<Item = &Domain> {
        self.inventory.domains.values()
    }

    /// The domain behind a port.
    pub fn domain_of_port(&self, ifindex: u32) -> Option<&Domain> {
        self.inventory.domain_of_port(ifindex)
    }

    /// Domains that wait for a place at `now`, in the order of their turns.
    pub fn waiting(&self, now: Timestamp) -> impl Iterator<Item = WaitingView<'_>> {
        self.queue.waiting(now)
    }

    /// The ports of the bridge.
    pub fn ports(&self) -> impl Iterator<Item = &Port> {
        self.inventory.ports.values()
    }

    /// The queriers heard by the uplinks.
    pub fn queriers(&self) -> impl Iterator<Item = (&QuerierKey, &Querier)> {
        self.mirror.queriers().elected()
    }

    /// The peers whose connection is up.
    pub fn connected_peers(&self) -> impl Iterator<Item = &str> {
        self.cx.links.connected()
    }

    /// Whether the hypervisor is connected.
    pub fn is_hypervisor_connected(&self) -> bool {
        self.inventory.hypervisor_connected
    }

    /// What was not acted upon.
    pub fn counters(&self) -> Counters {
        self.cx.counters
    }

    fn begin(&mut self, now: Timestamp) {
        self.cx.now = self.cx.now.max(now);
        if self.started.is_none() {
            self.started = Some(self.cx.now);
            Usage::due(&mut self.cx, &self.inventory);
        }
    }

    fn end(&mut self) {
        self.settle();
        self.departures.check(&self.cx);
        match self.mirror.next_due() {
            Some(due) => self.cx.timers.set(Timer::Ageing, due),
            None => self.cx.timers.stop(Timer::Ageing),
        }
    }

    /// The departures, and what they are lent.
    fn departing(&mut self) -> (&mut Departures, &mut Context, Around<'_>) {
        let around = Around {
            inventory: &self.inventory,
            mirror: &self.mirror,
            arrivals: &self.incoming,
            addresses: &mut self.addresses,
        };
        (&mut self.departures, &mut self.cx, around)
    }

    /// Takes what machines have found out to those whom that concerns.
    fn settle(&mut self) {
        while let Some(Changed { key, mode }) = self.receptions.poll_change() {
            self.reception_changed(key, mode);
        }
        while let Some(address) = self.addresses.poll_freed() {
            self.forget_address(address, false);
        }
    }

    /// Undoes what was made for an address, unless the other end of another move needs it.
    fn forget_address(&mut self, address: Ipv6Addr, spoken: bool) {
        let mut arrivals = self.incoming.values();
        let is_needed =
            arrivals.any(|incoming| incoming.watches(address)) || self.addresses.is_left(address);
        if !is_needed {
            self.cx.address(AddressCommand::Forget { address, spoken });
        }
    }

    /// Who else than a domain has an address.
    fn holder_of(&mut self, address: Ipv6Addr, uuid: DomainUuid) -> Option<Holder> {
        let holder = self.addresses.holder(address, uuid, self.cx.now);
        match holder {
            Some(Holder::Vm(_)) => holder,
            _ => claimant(&self.incoming, address, uuid)
                .map(Holder::Vm)
                .or(holder),
        }
    }

    /// What listeners and arriving VMs want of an address together, as far as a relay is to hear of it.
    fn wanted(&self, key: &ManagedKey) -> Filter {
        if self.cx.config.relay_timing(key).is_none() {
            return Filter::nothing();
        }
        let joined = self.entries.get(key).map(|entry| entry.joined.clone());
        let wanted: Vec<Filter> = self.mirror.filters(key).chain(joined).collect();
        Filter::merge(wanted.iter())
    }

    /// What is wanted of an address may have changed.
    fn refresh_filter(&mut self, key: ManagedKey) {
        let wanted = self.wanted(&key);
        self.receptions.want(&mut self.cx, key, wanted);
    }

    /// Stops watching an address unless somebody needs it.
    fn unmanage_unneeded(&mut self, key: ManagedKey) {
        if self.mirror.has_listener(&key) || self.entries.contains_key(&key) {
            self.refresh_filter(key);
        } else {
            self.receptions.forget(&mut self.cx, key);
        }
    }

    /// Time since the first input.
    fn uptime(&self) -> Duration {
        self.cx.now.since(self.started.unwrap_or(self.cx.now))
    }

    fn on_hypervisor(&mut self, event: HypervisorEvent) {
        match event {
            HypervisorEvent::Connected => {
                self.inventory.hypervisor_connected = true;
                self.ports_changed();
            }
            HypervisorEvent::Disconnected { reason } => {
                self.inventory.hypervisor_connected = false;
                tracing::warn!(%reason, "Hypervisor is not connected");
            }
            HypervisorEvent::Arriving { uuid, name } => {
                tracing::debug!(%uuid, name, "libvirt brings a domain");
                self.inventory.arriving.insert(uuid, name);
                self.check_name(uuid);
                self.ports_changed();
            }
            HypervisorEvent::Domain(domain) => {
                let (uuid, running) = (domain.uuid, domain.running);
                self.inventory.arriving.remove(&uuid);
                self.inventory.domains.insert(uuid, domain);
                self.check_name(uuid);
                self.ports_changed();
                self.incoming_domain(uuid, running);
                if running {
                    self.addresses.end_adopted_departures(&mut self.cx, uuid);
                }
            }
            // What becomes of one that has not arrived, its TAPs and its source tell.
            HypervisorEvent::Gone(uuid)
                if self.inventory.arriving.remove(&uuid).is_some()
                    && !self.inventory.domains.contains_key(&uuid) =>
            {
                self.ports_changed();
            }
            HypervisorEvent::Gone(uuid) => {
                self.inventory.domains.remove(&uuid);
                self.inventory.came.remove(&uuid);
                self.cx.vms.forget_domain(&uuid);
                self.departures
                    .domain_gone(&mut self.cx, &mut self.addresses, uuid);
                self.incoming_domain_gone(uuid);
                self.addresses.domain_gone(&mut self.cx, uuid);
            }
            HypervisorEvent::Suspended { uuid, at } => {
                self.departures
                    .suspended(&mut self.cx, &mut self.addresses, uuid, at);
            }
            HypervisorEvent::Resumed { uuid, migrated, at } => {
                if let Some(domain) = self.inventory.domains.get_mut(&uuid) {
                    domain.running = true;
                }
                if migrated {
                    self.inventory.came.insert(uuid, at);
                    self.cx.vms.has_moved(uuid, at);
                    self.arrived(uuid, at);
                } else {
                    self.departures.resumed(
                        &mut self.cx,
                        &self.inventory,
                        &mut self.addresses,
                        uuid,
                    );
                    self.addresses.end_adopted_departures(&mut self.cx, uuid);
                }
            }
            HypervisorEvent::Departing { uuid } => {
                self.departures
                    .departure_found(&mut self.cx, &self.inventory, uuid);
            }
            HypervisorEvent::Progress { uuid, stats } => {
                self.departures.progress(&mut self.cx, uuid, stats);
            }
            HypervisorEvent::MigrationEnded { uuid, result } => {
                let addresses = &mut self.addresses;
                self.departures
                    .ended(&mut self.cx, &self.inventory, addresses, uuid, result);
            }
        }
    }

    fn on_timer(&mut self, timer: Timer) {
        match timer {
            Timer::Streams(number) => {
                let (departures, cx, around) = self.departing();
                departures.streams_timed_out(cx, &around, number);
            }
            Timer::Response(number) => {
                self.departures
                    .response_timed_out(&mut self.cx, &mut self.addresses, number);
            }
            Timer::Again(number) => self.departures.ask_again(&mut self.cx, number),
            Timer::Ready(number) => {
                self.departures
                    .ready_timed_out(&mut self.cx, &mut self.addresses, number);
            }
            Timer::Reconnect(number) => self.reconnect_now(number),
            Timer::LateCuts(number) => self.departures.end_late_cuts(&mut self.cx, number),
            Timer::Closing(number) => self.cx.give_up_closing(number),
            Timer::Probe(key) => self.probe_timed_out(key),
            Timer::Unused(number) => self.arrival_unused(number),
            Timer::Hold(number) => self.hold_timed_out(number),
            Timer::Gate(ifindex) => self.gate_overdue(ifindex),
            Timer::Cut(number) => self.cut_timed_out(number),
            Timer::Claim(number) => self.claim_timed_out(number),
            Timer::Forwards => self.addresses.look_at_forwards(&mut self.cx),
            Timer::Translations => self.addresses.look_at_translations(&mut self.cx),
            Timer::Poll(number) => self.poll_answers(number),
            Timer::MdbRenewal(number) => self.renew_mdb(number),
            Timer::Preparation(command) => self.preparations.timed_out(&mut self.cx, command),
            Timer::Reception(key) => self.receptions.look(&mut self.cx, key),
            Timer::Session(key) => self.receptions.session_due(&mut self.cx, key),
            Timer::Watch => self.receptions.watch(&mut self.cx),
            Timer::Relay(number) => self.receptions.reconnect(&mut self.cx, number),
            Timer::Ageing => self.age_listeners(),
            Timer::Usage => Usage::due(&mut self.cx, &self.inventory),
        }
    }
}
