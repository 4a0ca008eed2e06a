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
use common::signal::{ErrorMessage, MigrationAbort, PeerMessage, Phase, VmMessage};

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

use addresses::Addresses;
use arrival::{Arrivals, Host};
use context::Context;
pub use context::Counters;
use departure::{Around, Departures};
use filter::Filter;
use host::inventory::{Inventory, Place};
use host::listeners::{Effect, Mirror};
use host::usage::Usage;
use reception::Receptions;
use refusal::bounded_reason;
use timer::Timer;

/// The protocol of one agent.
#[derive(Debug)]
pub struct Agent {
    cx: Context,
    inventory: Inventory,
    mirror: Mirror,
    departures: Departures,
    arrivals: Arrivals,
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
            arrivals: Arrivals::default(),
            receptions: Receptions::default(),
            usage: Usage::default(),
            addresses: Addresses::default(),
        }
    }

    /// Takes in a datagram that came in by `port` (its `SO_RCVMARK`), if by any.
    pub fn handle_datagram(&mut self, now: Timestamp, port: u32, from: SocketAddrV6, bytes: &[u8]) {
        self.input(now, |agent| agent.on_datagram(port, from, bytes));
    }

    /// Takes in what happened on the connection to a peer.
    pub fn handle_peer(&mut self, now: Timestamp, peer: &str, event: PeerEvent) {
        self.input(now, |agent| agent.on_peer(peer, event));
    }

    /// Takes in a change of the bridge's ports.
    pub fn handle_port(&mut self, now: Timestamp, event: PortEvent) {
        self.input(now, |agent| agent.on_port(event));
    }

    /// Takes in what the kernel programs and the bridge report.
    pub fn handle_datapath(&mut self, now: Timestamp, event: DatapathEvent) {
        self.input(now, |agent| agent.on_datapath(event));
    }

    /// Takes in what becomes of the gates.
    pub fn handle_gate(&mut self, now: Timestamp, event: GateEvent) {
        self.input(now, |agent| agent.on_gate(event));
    }

    /// Takes in what the hypervisor reports.
    pub fn handle_hypervisor(&mut self, now: Timestamp, event: HypervisorEvent) {
        self.input(now, |agent| agent.on_hypervisor(event));
    }

    /// Takes in an operator's command; `id` is repeated in every [`Output::Reply`] to it.
    pub fn handle_command(&mut self, now: Timestamp, id: u64, command: Command) {
        self.input(now, |agent| agent.on_command(id, command));
    }

    /// Does what is due at `now`. Calls before [`Self::poll_timeout`] do nothing.
    pub fn handle_timeout(&mut self, now: Timestamp) {
        self.input(now, |agent| {
            while let Some(timer) = agent.cx.timers.expire(agent.cx.now) {
                agent.on_timer(timer);
                agent.settle();
            }
        });
    }

    /// Takes in the relays that discovery has found, all of them each time.
    pub fn handle_relays(&mut self, now: Timestamp, candidates: Vec<RelayCandidate>) {
        self.input(now, |agent| {
            agent.receptions.found(&mut agent.cx, candidates);
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
        self.input(now, |agent| agent.receptions.pinned(managed, flows));
    }

    /// Takes in, once and after the first [`DatapathEvent::Snapshot`], that all listeners are known:
    /// what was pinned and nobody needs is given up.
    pub fn handle_adopted(&mut self, now: Timestamp) {
        self.input(now, |agent| {
            for key in agent.receptions.adopted(&mut agent.cx) {
                agent.unmanage_unneeded(key);
            }
        });
    }

    /// Takes in what has happened about a unicast address.
    pub fn handle_address(&mut self, now: Timestamp, event: AddressEvent) {
        self.input(now, |agent| agent.on_address(event));
    }

    /// Takes over what an agent before this one sends on in the kernel.
    pub fn handle_forwards(&mut self, now: Timestamp, forwards: Vec<(ForwardKey, Forward)>) {
        self.input(now, |agent| {
            agent.addresses.adopt_forwards(&mut agent.cx, forwards);
        });
    }

    /// Takes over what an agent before this one translates in the kernel.
    pub fn handle_translations(
        &mut self,
        now: Timestamp,
        translations: Vec<(TranslationKey, Translation)>,
    ) {
        self.input(now, |agent| {
            agent
                .addresses
                .adopt_translations(&mut agent.cx, translations);
        });
    }

    /// Takes in whether QEMU can encrypt copies here.
    pub fn handle_copy_tls(&mut self, now: Timestamp, copy_tls: CopyTls) {
        self.input(now, |agent| agent.cx.copy_tls = copy_tls);
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

    /// What the operator may see of it.
    pub fn view(&self) -> View<'_> {
        View(self)
    }

    /// Takes in something at `now`.
    fn input(&mut self, now: Timestamp, take: impl FnOnce(&mut Self)) {
        if self.cx.begin(now) {
            Usage::due(&mut self.cx, &self.inventory);
        }
        take(self);
        self.settle();
        self.mirror.set_timer(&mut self.cx);
        self.departures.check(&self.cx);
        self.arrivals.check(&self.cx, &self.inventory);
    }

    /// The departures, and what they are lent.
    fn departing(&mut self) -> (&mut Departures, &mut Context, Around<'_>) {
        let around = Around {
            inventory: &self.inventory,
            mirror: &self.mirror,
            arrivals: &self.arrivals,
            addresses: &mut self.addresses,
        };
        (&mut self.departures, &mut self.cx, around)
    }

    /// Takes what machines have found out to those whom that concerns.
    fn settle(&mut self) {
        while let Some(changed) = self.receptions.poll_change() {
            self.arrivals.reception_changed(&mut self.cx, changed);
        }
        while let Some(address) = self.addresses.poll_freed() {
            self.arrivals
                .forget_address(&mut self.cx, &self.addresses, address, false);
        }
    }

    /// What listeners and arriving VMs want of an address together, as far as a relay is to hear of it.
    fn wanted(&self, key: &ManagedKey) -> Filter {
        self.arrivals.wanted(&self.cx, &self.mirror, key)
    }

    /// What is wanted of an address may have changed.
    fn refresh_filter(&mut self, key: ManagedKey) {
        self.with_arrivals(|arrivals, cx, host| arrivals.refresh_filter(cx, host, key));
    }

    /// Stops watching an address unless somebody needs it.
    fn unmanage_unneeded(&mut self, key: ManagedKey) {
        self.with_arrivals(|arrivals, cx, host| arrivals.unmanage_unneeded(cx, host, key));
    }

    fn on_datagram(&mut self, port: u32, from: SocketAddrV6, bytes: &[u8]) {
        if !self.cx.is_heard(&self.inventory, port, from) {
            return;
        }
        let decoded = VmMessage::decode(bytes);
        if let Ok((transaction, VmMessage::MigrationReady(_))) = &decoded
            && self.with_arrivals(|arrivals, cx, host| {
                arrivals.answer_vm(cx, host, port, *transaction, from)
            })
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
                if !is_known && !self.arrivals.expects(caller.domain.uuid) {
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
                self.arrivals.source_up(cx, peer);
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
                self.arrivals
                    .peer_down(&mut self.cx, &self.inventory, peer, &reason);
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
            PeerMessage::AgentRequest(body) => self.with_arrivals(|arrivals, cx, host| {
                arrivals.requested(cx, host, from, body);
            }),
            PeerMessage::AgentResponse(body) => {
                let (departures, cx, around) = self.departing();
                departures.on_agent_response(cx, around, from, body);
            }
            PeerMessage::MigrationProgress(body) => {
                let is_told = body.phase == Phase::Preparing
                    && self.departures.told_to_wait(&mut self.cx, from);
                if !is_told {
                    self.with_arrivals(|arrivals, cx, host| {
                        arrivals.progressed(cx, host, from, body);
                    });
                }
            }
            PeerMessage::HandoverCut(body) => {
                self.arrivals
                    .cut_told(&mut self.cx, &self.inventory, from, &body);
            }
            PeerMessage::ArrivalNotice(body) => {
                let allowed = self.arrivals.check_rate(&self.cx, peer, transaction);
                let (departures, cx, around) = self.departing();
                departures.on_arrival_notice(cx, around, from, &body, allowed);
            }
            PeerMessage::AddressClaim(body) => self.with_arrivals(|arrivals, cx, host| {
                arrivals.claimed(cx, host, from, &body);
            }),
            PeerMessage::AddressClaimReply(body) => {
                let (departures, cx, around) = self.departing();
                departures.on_address_claim_reply(cx, around.addresses, from, &body);
            }
            PeerMessage::RelayRequest(_) => self.cx.release_as_no_relay(peer, transaction),
            PeerMessage::RelayResponse(_) | PeerMessage::RelayRelease(_) => {}
            PeerMessage::MigrationAbort(MigrationAbort(reason))
            | PeerMessage::Error(ErrorMessage(reason)) => {
                let reason = bounded_reason(&reason);
                let (departures, cx, around) = self.departing();
                departures.peer_refused(cx, around.addresses, from, &reason);
                self.with_arrivals(|arrivals, cx, host| {
                    arrivals.aborted(cx, host, from, &reason);
                });
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
                self.arrivals
                    .first_packet(&mut self.cx, &self.receptions, &key, origin, at);
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
                    self.arrivals
                        .streams_read(&mut self.cx, &self.receptions, token, &streams);
                }
            }
            DatapathEvent::Refused { listeners, sources } => {
                self.with_arrivals(|_, cx, host| host.reports_refused(cx, &listeners, &sources));
            }
            DatapathEvent::Failed { key, reason } => {
                self.usage.failed(cx.now, &key, &reason);
                self.arrivals.join_failed(cx, key);
            }
        }
        self.follow_mirror();
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
                    if !told && !self.arrivals.has_joined(&key) {
                        self.cx.outputs.push_back(Output::Prune(key));
                    }
                    self.unmanage_unneeded(key);
                }
                Effect::Wanted(key) => self.refresh_filter(key),
                Effect::Reported(listener) => self.with_arrivals(|arrivals, cx, host| {
                    arrivals.vm_reported(cx, host, &listener);
                }),
                Effect::Left(listener) => self.with_arrivals(|arrivals, cx, host| {
                    arrivals.vm_left(cx, host, &listener);
                }),
                Effect::Queried { vlan, at } => {
                    self.arrivals
                        .query_came(&mut self.cx, &self.mirror, vlan, at);
                }
                Effect::EventsLost => self.arrivals.read_probed_streams(&mut self.cx),
            }
        }
    }

    fn on_port(&mut self, event: PortEvent) {
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
                self.with_arrivals(Arrivals::cut_off);
            }
        }
    }

    fn on_gate(&mut self, event: GateEvent) {
        let Self { cx, departures, .. } = self;
        match event {
            GateEvent::Cut { ifindex, cut } => departures.cut_placed(cx, ifindex, cut),
            GateEvent::NotRecorded { ifindex } => departures.not_recorded(cx, ifindex),
            GateEvent::Opened { ifindex, report } => {
                self.arrivals.gate_opened(cx, ifindex, report);
            }
            GateEvent::NotHeld { ifindex } => self.with_arrivals(|arrivals, cx, host| {
                arrivals.not_held(cx, host, ifindex, Ungated::NotMade);
            }),
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
    }

    fn on_command(&mut self, id: u64, command: Command) {
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
            } => {
                let said = (uuid, domain.as_str(), source.as_str());
                self.with_arrivals(|arrivals, cx, host| arrivals.prepare(cx, host, id, said));
            }
        }
    }

    fn on_address(&mut self, event: AddressEvent) {
        match event {
            AddressEvent::Heard { address, said, by } => {
                self.with_arrivals(|arrivals, cx, host| {
                    arrivals.address_heard(cx, host, address, said, by);
                });
                let Self { cx, addresses, .. } = self;
                let disputed = addresses.departure_heard(cx, &self.inventory, address, said, by);
                if let Some(number) = disputed {
                    self.departures.claim_anew(cx, addresses, number);
                }
            }
            AddressEvent::Own { address } => {
                self.with_arrivals(|arrivals, cx, host| {
                    arrivals.address_is_own(cx, host, address);
                });
                self.addresses.departure_of_own(&mut self.cx, address);
            }
            AddressEvent::Spoke { address } => {
                self.with_arrivals(|arrivals, cx, host| arrivals.address_spoken(cx, host, address));
            }
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
                if running {
                    self.runs_here(uuid, self.cx.now);
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
                    self.with_arrivals(|arrivals, cx, host| arrivals.domain_gone(cx, host, uuid));
                    self.addresses.domain_gone(&mut self.cx, uuid);
                }
            },
            HypervisorEvent::Resumed { uuid, migrated, at } => {
                self.inventory.domain_runs(&uuid);
                if migrated {
                    self.inventory.came.insert(uuid, at);
                    self.cx.vms.has_moved(uuid, at);
                    self.runs_here(uuid, at);
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
            Timer::Probe(key) => self.arrivals.probe_timed_out(&mut self.cx, key),
            Timer::Unused(number) => {
                self.with_arrivals(|arrivals, cx, host| arrivals.unused(cx, host, number));
            }
            Timer::Hold(number) => {
                self.with_arrivals(|arrivals, cx, host| arrivals.hold_timed_out(cx, host, number));
            }
            Timer::Gate(ifindex) => {
                self.with_arrivals(|arrivals, cx, host| arrivals.gate_overdue(cx, host, ifindex));
            }
            Timer::Cut(number) => self.arrivals.cut_timed_out(&mut self.cx, number),
            Timer::Claim(number) => {
                self.arrivals
                    .claim_timed_out(&mut self.cx, &self.addresses, number);
            }
            Timer::Forwards => self.addresses.look_at_forwards(&mut self.cx),
            Timer::Translations => self.addresses.look_at_translations(&mut self.cx),
            Timer::Poll(number) => {
                self.arrivals
                    .poll_answers(&mut self.cx, &self.inventory, number);
            }
            Timer::MdbRenewal(number) => {
                self.arrivals
                    .renew_mdb(&mut self.cx, &self.inventory, number);
            }
            Timer::Preparation(command) => self.arrivals.hook_timed_out(&mut self.cx, command),
            Timer::Reception(key) => self.receptions.look(&mut self.cx, key),
            Timer::Session(key) => self.receptions.session_due(&mut self.cx, key),
            Timer::Watch => self.receptions.watch(&mut self.cx),
            Timer::Relay(number) => self.receptions.reconnect(&mut self.cx, number),
            Timer::Ageing => self.mirror.age(&mut self.cx),
            Timer::Usage => Usage::due(&mut self.cx, &self.inventory),
        }
    }
}

/// Routes to the migrations that arrive.
impl Agent {
    /// Has arrivals do something, and lends them what they need.
    fn with_arrivals<T>(
        &mut self,
        act: impl FnOnce(&mut Arrivals, &mut Context, &mut Host<'_>) -> T,
    ) -> T {
        let mut host = Host {
            inventory: &self.inventory,
            mirror: &self.mirror,
            receptions: &mut self.receptions,
            addresses: &mut self.addresses,
        };
        act(&mut self.arrivals, &mut self.cx, &mut host)
    }

    fn ports_changed(&mut self) {
        self.with_arrivals(Arrivals::ports_changed);
    }

    fn check_name(&mut self, uuid: DomainUuid) {
        self.with_arrivals(|arrivals, cx, host| arrivals.check_name(cx, host, uuid));
    }

    fn runs_here(&mut self, uuid: DomainUuid, at: Timestamp) {
        self.with_arrivals(|arrivals, cx, host| arrivals.runs_here(cx, host, uuid, at));
    }
}
