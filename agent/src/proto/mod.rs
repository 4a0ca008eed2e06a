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
//! | `arrival` | migrations that arrive: joins, probes, holding and releasing |
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
use common::signal::{DecodeError, ErrorMessage, MigrationAbort, PeerMessage, Phase, VmMessage};

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

use addresses::{Addresses, Holder};
use arrival::{Arrivals, Entry, Incoming, Preparations, Queue, claimant};
use context::Context;
pub use context::Counters;
use departure::{Around, Departures};
use filter::Filter;
use host::inventory::{self, Inventory, Place};
use host::listeners::{self as listener, Effect, Mirror};
use host::usage::Usage;
use rate::Rates;
use reception::{Changed, ModeView, Receptions, RelayView, SessionView};
use refusal::bounded;
use timer::Timer;

/// The protocol of one agent.
#[derive(Debug)]
pub struct Agent {
    cx: Context,
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
        if self.cx.is_heard(&self.inventory, port, from) {
            self.on_datagram(port, from, VmMessage::decode(bytes));
        }
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
                self.mirror.port_gone(ifindex);
                self.follow_mirror();
                self.addresses.port_gone(&mut self.cx, ifindex);
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
        self.follow_mirror();
        self.end();
    }

    /// Takes in what becomes of the gates.
    pub fn handle_gate(&mut self, now: Timestamp, event: GateEvent) {
        self.begin(now);
        let Self { cx, departures, .. } = self;
        match event {
            GateEvent::Cut { ifindex, cut } => departures.cut_placed(cx, ifindex, cut),
            GateEvent::NotRecorded { ifindex } => departures.not_recorded(cx, ifindex),
            GateEvent::Opened { ifindex, report } => self.gate_opened(ifindex, report),
            GateEvent::NotHeld { ifindex } => self.not_held(ifindex, Ungated::NotMade),
            GateEvent::SentOn { migration, report } => {
                cx.records
                    .update(migration, |record| record.sent_on(report));
            }
            GateEvent::RunsOn {
                migration,
                thrown_away_at_most,
            } => cx.records.update(migration, |record| {
                record.thrown_away(thrown_away_at_most);
            }),
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
        let (departures, cx, around) = self.departing();
        match command {
            Command::Migrate {
                domain,
                destination,
            } => departures.command_migrate(cx, around, id, &domain, &destination),
            Command::Abort { domain } => {
                departures.command_abort(cx, around.addresses, id, &domain);
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
                let Self { cx, addresses, .. } = self;
                let disputed = addresses.departure_heard(cx, &self.inventory, address, said, by);
                if let Some(number) = disputed {
                    self.departures.claim_anew(cx, addresses, number);
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
        if self.cx.begin(now) {
            Usage::due(&mut self.cx, &self.inventory);
        }
    }

    fn end(&mut self) {
        self.settle();
        self.mirror.set_timer(&mut self.cx);
        self.departures.check(&self.cx);
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
        self.cx.uptime()
    }

    fn on_datagram(
        &mut self,
        port: u32,
        from: SocketAddrV6,
        decoded: Result<(u64, VmMessage), DecodeError>,
    ) {
        if let Ok((transaction, VmMessage::MigrationReady(_))) = &decoded
            && self.answer_arrival(port, *transaction, from)
        {
            return;
        }
        let understood = self.cx.understand(&self.inventory, port, from, decoded);
        let Some((caller, message)) = understood else {
            return;
        };
        let (departures, cx, around) = self.departing();
        match message {
            VmMessage::AgentSearch(_) => cx.answer_search(&caller),
            VmMessage::MigrationRequest(body) => {
                if !cx.answer_again(&caller) && !departures.answer_request_again(cx, &caller) {
                    departures.request_from_vm(cx, around, &caller, body);
                }
            }
            VmMessage::MigrationReady(body) => {
                let is_known = cx.answer_again(&caller)
                    || departures.ready_from_vm(cx, around, &caller, &body);
                if !is_known && !self.expects(&caller.domain.uuid) {
                    self.cx.deny(&caller);
                }
            }
            VmMessage::MigrationAbort(_) => departures.vm_aborts(cx, around.addresses, &caller),
            VmMessage::AgentSearchReply(_)
            | VmMessage::MigrationResponse(_)
            | VmMessage::MigrationProgress(_) => cx.counters.malformed_datagrams += 1,
        }
    }

    fn on_peer(&mut self, peer: &str, event: PeerEvent) {
        let Self {
            cx,
            departures,
            receptions,
            addresses,
            ..
        } = self;
        match event {
            PeerEvent::Up { .. } => {
                cx.link_up(peer);
                receptions.relay_up(cx, peer);
                departures.peer_up(cx, addresses, peer);
                cx.flush_closings(peer);
                self.preparations.peer_up(cx, peer);
            }
            PeerEvent::Down { reason } if receptions.is_relay(peer) => {
                cx.link_down(peer);
                receptions.relay_down(cx, peer, &reason);
            }
            PeerEvent::Down { reason } => {
                cx.link_down(peer);
                tracing::warn!(peer, %reason, "Peer is not connected");
                cx.reconnect_closings(peer);
                departures.peer_down(cx, addresses, peer, &reason);
                self.incoming_peer_down(peer);
                self.preparations.peer_down(&mut self.cx, peer, &reason);
            }
            PeerEvent::Frame(bytes) => match cx.hear(peer, &bytes) {
                Some((transaction, message)) if receptions.is_relay(peer) => {
                    receptions.relay_said(cx, peer, transaction, &message);
                }
                Some((transaction, message)) => self.on_message(peer, transaction, message),
                None => {}
            },
        }
    }

    fn on_message(&mut self, peer: &str, transaction: u64, message: PeerMessage) {
        let from = (peer, transaction);
        match message {
            PeerMessage::AgentRequest(body) => self.on_agent_request(peer, transaction, body),
            PeerMessage::AgentResponse(body) => {
                let (departures, cx, around) = self.departing();
                departures.on_agent_response(cx, around, from, body);
            }
            PeerMessage::MigrationProgress(body) => {
                let is_told = body.phase == Phase::Preparing
                    && self.departures.told_to_wait(&mut self.cx, from);
                if !is_told {
                    self.on_peer_progress(peer, transaction, body);
                }
            }
            PeerMessage::HandoverCut(body) => self.on_handover_cut(peer, transaction, &body),
            PeerMessage::ArrivalNotice(body) => {
                let allowed = self.check_rate(peer, transaction);
                let (departures, cx, around) = self.departing();
                departures.on_arrival_notice(cx, around, from, &body, allowed);
            }
            PeerMessage::AddressClaim(body) => self.on_address_claim(peer, transaction, &body),
            PeerMessage::AddressClaimReply(body) => {
                let (departures, cx, around) = self.departing();
                departures.on_address_claim_reply(cx, around.addresses, from, &body);
            }
            PeerMessage::RelayRequest(_) => self.cx.release_as_no_relay(peer, transaction),
            PeerMessage::RelayResponse(_) | PeerMessage::RelayRelease(_) => {}
            PeerMessage::MigrationAbort(MigrationAbort { reason })
            | PeerMessage::Error(ErrorMessage { reason }) => {
                let reason = bounded(&reason);
                let (departures, cx, around) = self.departing();
                departures.peer_refused(cx, around.addresses, from, &reason);
                self.on_peer_abort(peer, transaction, &reason);
                self.preparations
                    .refused(&mut self.cx, peer, transaction, &reason);
            }
        }
    }

    fn on_datapath(&mut self, event: DatapathEvent) {
        let (mirror, cx) = (&mut self.mirror, &mut self.cx);
        match event {
            DatapathEvent::Listener { change, key, value } => {
                mirror.listener_seen(change, key, value);
            }
            DatapathEvent::Source { change, key, value } => mirror.source_seen(change, key, value),
            DatapathEvent::Query { key, value } => mirror.query_seen(key, value),
            DatapathEvent::Snapshot {
                listeners,
                sources,
                queriers,
            } => mirror.snapshot_seen(listeners, sources, queriers),
            DatapathEvent::FirstPacket { key, origin, at } => {
                self.first_packet(&key, origin, at);
                self.receptions.packet(&mut self.cx, &key, origin, at);
            }
            DatapathEvent::Usage { ifindex, usage } => {
                self.usage.read(cx.now, &self.inventory, ifindex, usage);
            }
            DatapathEvent::Streams { token, streams } => {
                let (departures, cx, around) = self.departing();
                if !departures.streams_read(cx, &around, token, &streams)
                    && !self.receptions.streams_read(&mut self.cx, token, &streams)
                {
                    self.streams_read(token, &streams);
                }
            }
            DatapathEvent::Refused { listeners, sources } => {
                self.reports_refused(&listeners, &sources);
            }
            DatapathEvent::Failed { key, reason } => {
                self.usage.failed(cx.now, &key, &reason);
                self.join_failed(key);
            }
        }
    }

    /// Does what others are to do about what the kernel has reported of listeners.
    fn follow_mirror(&mut self) {
        while let Some(effect) = self.mirror.poll_effect(&mut self.cx) {
            match effect {
                Effect::Appeared(key) => {
                    let wanted = self.wanted(&key);
                    self.receptions.receive(&mut self.cx, key, wanted);
                }
                Effect::Vanished { key, told } => {
                    if !told && !self.entries.contains_key(&key) {
                        self.cx.outputs.push_back(Output::Prune(key));
                    }
                    self.unmanage_unneeded(key);
                }
                Effect::Wanted(key) => self.refresh_filter(key),
                Effect::Reported(listener) => self.arrived_vm_reported(&listener),
                Effect::Left(listener) => self.arrived_vm_left(&listener),
                Effect::Queried { vlan, at } => self.query_came(vlan, at),
                Effect::EventsLost => self.read_probed_streams(),
            }
        }
    }

    fn on_hypervisor(&mut self, event: HypervisorEvent) {
        let (departures, cx, around) = self.departing();
        match event {
            HypervisorEvent::Connected => {
                self.inventory.hypervisor_connected = true;
                self.ports_changed();
            }
            HypervisorEvent::Disconnected { reason } => self.inventory.disconnected(&reason),
            HypervisorEvent::Arriving { uuid, name } => {
                self.inventory.domain_comes(uuid, name);
                self.check_name(uuid);
                self.ports_changed();
            }
            HypervisorEvent::Domain(domain) => {
                let (uuid, running) = (domain.uuid, domain.running);
                self.inventory.domain_seen(domain);
                self.check_name(uuid);
                self.ports_changed();
                self.incoming_domain(uuid, running);
                if running {
                    self.addresses.end_adopted_departures(&mut self.cx, uuid);
                }
            }
            HypervisorEvent::Gone(uuid) => match self.inventory.domain_gone(&uuid) {
                // What becomes of one that has not arrived, its TAPs and its source tell.
                Place::OnItsWay => self.ports_changed(),
                Place::Here => {
                    let Self { cx, addresses, .. } = self;
                    cx.vms.forget_domain(&uuid);
                    self.departures.domain_gone(cx, addresses, uuid);
                    self.incoming_domain_gone(uuid);
                    self.addresses.domain_gone(&mut self.cx, uuid);
                }
            },
            HypervisorEvent::Resumed { uuid, migrated, at } => {
                self.inventory.domain_runs(&uuid);
                if migrated {
                    self.inventory.came.insert(uuid, at);
                    self.cx.vms.has_moved(uuid, at);
                    self.arrived(uuid, at);
                } else {
                    let (departures, cx, around) = self.departing();
                    departures.resumed(cx, around.inventory, around.addresses, uuid);
                    self.addresses.end_adopted_departures(&mut self.cx, uuid);
                }
            }
            HypervisorEvent::Suspended { uuid, at } => {
                departures.suspended(cx, around.addresses, uuid, at);
            }
            HypervisorEvent::Departing { uuid } => departures.found(cx, around.inventory, uuid),
            HypervisorEvent::Progress { uuid, stats } => departures.progress(cx, uuid, stats),
            HypervisorEvent::MigrationEnded { uuid, result } => {
                departures.ended(cx, around, uuid, result);
            }
        }
    }

    fn on_timer(&mut self, timer: Timer) {
        let (departures, cx, around) = self.departing();
        match timer {
            Timer::Streams(number) => departures.streams_timed_out(cx, &around, number),
            Timer::Response(number) => departures.response_timed_out(cx, around.addresses, number),
            Timer::Again(number) => departures.ask_again(cx, number),
            Timer::Ready(number) => departures.ready_timed_out(cx, around.addresses, number),
            Timer::Reconnect(number) => {
                if !departures.reconnect(cx, number) {
                    cx.reconnect_closing(number);
                }
            }
            Timer::LateCuts(number) => departures.end_late_cuts(cx, number),
            Timer::Closing(number) => cx.give_up_closing(number),
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
            Timer::Ageing => self.mirror.age(&mut self.cx),
            Timer::Usage => Usage::due(&mut self.cx, &self.inventory),
        }
    }
}
