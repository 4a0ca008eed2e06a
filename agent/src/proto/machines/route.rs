//! Dispatch: each input's path to the state machine that handles the input.

use std::net::SocketAddrV6;

use common::maps::BridgeNumber;
use common::signal::{ErrorMessage, MigrationAbort, PeerMessage, Phase, VmMessage};

use super::Machines;
use crate::proto::arrival::Arrivals;
use crate::proto::host::inventory::Place;
use crate::proto::host::usage::Usage;
use crate::proto::refusal::bounded_reason;
use crate::proto::timer::Timer;
use crate::proto::{
    AddressEvent, Command, DatapathEvent, GateEvent, HypervisorEvent, LinkAddress, PeerEvent,
    PortEvent, Ungated,
};

impl Machines {
    pub(in crate::proto) fn on_datagram(&mut self, port: u32, from: SocketAddrV6, bytes: &[u8]) {
        let Some(from) = self.cx.sender(&self.inventory, port, from) else {
            return;
        };
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

    pub(in crate::proto) fn on_peer(&mut self, peer: &str, event: PeerEvent) {
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

    pub(in crate::proto) fn on_datapath(&mut self, event: DatapathEvent) {
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

    pub(in crate::proto) fn on_port(&mut self, event: PortEvent) {
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

    pub(in crate::proto) fn on_gate(&mut self, event: GateEvent) {
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

    pub(in crate::proto) fn on_command(&mut self, id: u64, command: Command) {
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

    pub(in crate::proto) fn on_address(&mut self, bridge: BridgeNumber, event: AddressEvent) {
        let on = |address| LinkAddress { bridge, address };
        match event {
            AddressEvent::Heard { address, said, by } => {
                let address = on(address);
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
                let address = on(address);
                self.with_arrivals(|arrivals, cx, host| {
                    arrivals.address_is_own(cx, host, address);
                });
                self.addresses.departure_of_own(&mut self.cx, address);
            }
            AddressEvent::Spoke { address } => {
                let address = on(address);
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

    pub(in crate::proto) fn on_hypervisor(&mut self, event: HypervisorEvent) {
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
                // The fate of an arriving domain shows in its TAPs and in its source's messages.
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

    pub(in crate::proto) fn on_timer(&mut self, timer: Timer) {
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
