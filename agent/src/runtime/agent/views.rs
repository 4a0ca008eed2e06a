//! Rows for the operator, from the protocol's state and from the maps.

mod ports;

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{ManagedKey, StreamKey};
use common::signal::Reception as Verdict;
use tokio::sync::mpsc;

use super::RuntimeError;
use super::event_loop::EventLoop;
use crate::clock::now;
use crate::control::Reply;
use crate::control::report::{
    Direction, HandoverRow, HypervisorStatus, JoinRow, LinkState, ListenerRow, Mac, MemoryWay,
    MigrationRow, NicRow, Outcome, PeerRow, Placement, QuerierRow, Reception, ReceptionRow,
    RelayRow, RelaySessionRow, RelaySessionState, Status, StreamRow, UngatedReason, UngatedRow,
    UnicastRow, WaitingRow, age_ms, milliseconds,
};
use crate::proto::handover::{FlowReport, HoldReport, Placed};
use crate::proto::reception::SessionView;
use crate::proto::{
    self, CopyConfig, CopyTls, MigrationRecord, NoCopyTls, Stream, Timestamp, Ungated, WaitingView,
};
use crate::runtime::counters;
use crate::value::Prefix;

type Replies = mpsc::UnboundedSender<Reply>;

impl EventLoop {
    /// Answers `roamcast status`.
    pub(super) fn status(&self) -> Result<Status, RuntimeError> {
        let now = now();
        let config = &self.config;
        let hooks = self.datapath.hooks()?;
        Ok(Status {
            agent: config.agent.name.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: age_ms(now, self.started.0),
            longest_stall_ms: milliseconds(self.turns.longest),
            stalls: self.turns.stalls,
            bridge: config.agent.bridge.to_string(),
            prefix: Some(Prefix::of(self.address, self.prefix_length).to_string()),
            address: Some(self.address),
            pin_path: self.datapath.pin_path().display().to_string(),
            uplinks: self.uplink_rows(&hooks),
            queriers: self
                .proto
                .view()
                .queriers()
                .map(|(key, value)| QuerierRow::new(self.hooks.name(key.ifindex), key, value, now))
                .collect(),
            peers: self.peers_view(),
            hypervisor: HypervisorStatus {
                uri: config.libvirt.uri.clone(),
                state: self.hypervisor_state.0,
                reason: self.hypervisor_state.1.clone(),
                domains: u32::try_from(self.proto.view().domains().count()).unwrap_or(u32::MAX),
            },
            ports: self.port_rows(&hooks)?,
            port_problems: self.hooks.problems(),
            receptions: self
                .proto
                .view()
                .receptions()
                .map(|view| JoinRow {
                    vlan: view.membership.key.vlan,
                    multicast_address: view.membership.key.multicast_address.into(),
                    mode: view.reception.map_or(Reception::Probing, Into::into),
                    waited_ms: milliseconds(view.waited),
                    domains: view.domains.iter().map(|name| (*name).to_owned()).collect(),
                    held: view.held,
                })
                .collect(),
            modes: self.modes(),
            relays: self.relays_view()?,
            relay_problems: self
                .relay_problems
                .iter()
                .cloned()
                .chain(self.registrar.problems())
                .collect(),
            certificate_ends_in_days: self.peers.certificate_ends_in_days(),
            memory_problems: memory_problems(
                self.proto.view().copy_tls(),
                self.proto.config().copy,
            ),
            migrations: self
                .proto
                .view()
                .migrations()
                .filter(|record| record.outcome.is_none())
                .map(|record| migration_row(record, now))
                .collect(),
            waiting: self.proto.view().waiting(now).map(waiting_row).collect(),
            counters: self.counters()?,
        })
    }

    /// Returns the number of watched addresses for each kind of reception; empty if no relay is
    /// configured.
    fn modes(&self) -> BTreeMap<String, u32> {
        let mut modes = BTreeMap::new();
        if self.config.relay.is_used() {
            for view in self.proto.view().modes() {
                *modes.entry(view.mode.as_str().to_owned()).or_default() += 1;
            }
        }
        modes
    }

    fn relays_view(&self) -> Result<Vec<RelayRow>, RuntimeError> {
        let views: Vec<_> = self.proto.view().relay_sessions().collect();
        let streams: BTreeMap<_, _> = if views.is_empty() {
            BTreeMap::new()
        } else {
            self.datapath.all_streams()?.into_iter().collect()
        };
        let sessions = |name: Option<&str>| -> Vec<RelaySessionRow> {
            let of_relay = views.iter().filter(|view| view.relay == name);
            of_relay.map(|view| session_row(view, &streams)).collect()
        };
        let mut rows: Vec<RelayRow> = self
            .proto
            .view()
            .relays()
            .map(|view| RelayRow {
                relay: Some(view.candidate.name.clone()),
                found_by: Some(view.candidate.found_by.clone()),
                state: if view.up {
                    LinkState::Up
                } else if view.reason.is_none() {
                    LinkState::Connecting
                } else {
                    LinkState::Down
                },
                reason: view.reason.map(str::to_owned),
                sessions: sessions(Some(view.candidate.name.as_str())),
            })
            .collect();
        let adopted = sessions(None);
        if !adopted.is_empty() {
            rows.push(RelayRow {
                relay: None,
                found_by: None,
                state: LinkState::Connecting,
                reason: None,
                sessions: adopted,
            });
        }
        Ok(rows)
    }

    /// Answers `roamcast relays`.
    pub(super) fn send_relays(&self, replies: &Replies) -> Result<(), RuntimeError> {
        let _ = replies.send(Reply::Relays(self.relays_view()?));
        Ok(())
    }

    fn peers_view(&self) -> Vec<PeerRow> {
        self.peer_states
            .iter()
            .map(|(name, (state, reason))| PeerRow {
                name: name.clone(),
                address: self.config.peer(name).map(|peer| peer.address.to_string()),
                state: *state,
                reason: reason.clone(),
            })
            .collect()
    }

    /// Returns the counters of the kernel programs, the protocol and the connections, without
    /// zeros.
    fn counters(&self) -> Result<BTreeMap<String, u64>, RuntimeError> {
        let proto = self.proto.view().counters();
        let signalling = [
            ("datagrams_dropped", self.bridges.dropped_datagrams()),
            ("bridges_unknown", self.bridges.unknown()),
            ("datagrams_unknown_port", proto.unknown_port_datagrams),
            ("datagrams_unhoused", proto.datagrams_without_domain),
            ("datagrams_off_link", proto.off_link_datagrams),
            ("datagrams_malformed", proto.malformed_datagrams),
            ("frames_malformed", proto.malformed_frames),
            ("relay_lies", proto.relay_lies),
            ("relay_refusals", proto.relay_refusals),
            ("relay_failovers", proto.relay_failovers),
            ("claims_refused", proto.claims_refused),
            ("claims_silent", proto.claims_silent),
            ("addresses_disputed", proto.addresses_disputed),
            ("forwards_refused", proto.forwards_refused),
        ];
        let own = self.datapath.counters()?.into_iter();
        let own = own.chain(signalling).chain(self.hooks.counters());
        Ok(counters(own, &self.peers))
    }

    /// Answers `roamcast listeners`.
    pub(super) fn send_listeners(&self, replies: &Replies) {
        let now = now();
        let ports: BTreeMap<u32, (&str, Option<&str>)> = self
            .proto
            .view()
            .ports()
            .map(|port| {
                let domain = self.proto.view().domain_of_port(port.ifindex);
                (
                    port.ifindex,
                    (
                        port.name.as_str(),
                        domain.map(|domain| domain.name.as_str()),
                    ),
                )
            })
            .collect();
        let rows = self.proto.view().listeners().map(|view| {
            let (port, domain) = ports.get(&view.key.ifindex).map_or_else(
                || (view.key.ifindex.to_string(), None),
                |(port, domain)| ((*port).to_owned(), domain.map(str::to_owned)),
            );
            ListenerRow::new(domain, port, &view.key, view.value, view.sources, now)
        });
        // The send fails if the operator has left.
        let _ = replies.send(Reply::Listeners(rows.collect()));
    }

    /// Answers `roamcast streams`.
    pub(super) fn send_streams(&self, replies: &Replies) -> Result<(), RuntimeError> {
        let now = now();
        let streams = self.datapath.all_streams()?;
        let modes: BTreeMap<ManagedKey, &str> = self
            .proto
            .view()
            .modes()
            .map(|view| (view.key, view.mode.as_str()))
            .collect();
        let rows = streams.iter().map(|(key, value)| {
            let mode = modes.get(&key.managed()).copied();
            StreamRow::new(key, value, mode, now)
        });
        let _ = replies.send(Reply::Streams(rows.collect()));
        Ok(())
    }

    /// Answers `roamcast migrations`.
    pub(super) fn send_migrations(&self, replies: &Replies) {
        let now = now();
        let rows = self
            .proto
            .view()
            .migrations()
            .map(|record| migration_row(record, now));
        let _ = replies.send(Reply::Migrations(rows.collect()));
    }
}

fn migration_row(record: &MigrationRecord, now: Timestamp) -> MigrationRow {
    MigrationRow {
        migration: record.number,
        direction: match record.direction {
            proto::Direction::Outgoing => Direction::Outgoing,
            proto::Direction::Incoming => Direction::Incoming,
        },
        domain: record.domain_name.clone(),
        domain_uuid: record.domain_uuid.to_string(),
        peer: record.peer.clone(),
        phase: record.phase.into(),
        age_ms: milliseconds(now.since(record.started)),
        signalling_ms: record.signalling.map(fractional),
        copy_ms: record.copy.map(fractional),
        memory: record.way.as_ref().map(MemoryWay::from),
        vm_pause_ms: record.vm_pause.map(fractional),
        total_ms: record.total.map(fractional),
        processed_bytes: record.processed_bytes,
        total_bytes: record.total_bytes,
        receptions: record.receptions.iter().map(verdict_row).collect(),
        handover: handover_rows(&record.handover),
        nics: nics(&record.handover),
        without_gate: without_gate(&record.ungated),
        thrown_away_at_most: record.thrown_away_at_most,
        unicast: record.unicast.as_ref().map(UnicastRow::from),
        outcome: match &record.outcome {
            None => Outcome::Running,
            Some(proto::Outcome::Completed) => Outcome::Completed,
            Some(proto::Outcome::Failed(reason)) => Outcome::Failed {
                reason: reason.text.clone(),
                code: reason.code.to_string(),
            },
        },
    }
}

fn waiting_row(view: WaitingView<'_>) -> WaitingRow {
    WaitingRow {
        domain: view.domain.to_owned(),
        source: view.source.to_owned(),
        waited_ms: milliseconds(view.waited),
    }
}

/// Returns a sentence for each direction in which memory should be encrypted but QEMU lacks a
/// certificate.
fn memory_problems(tls: &CopyTls, copy: CopyConfig) -> Vec<String> {
    if !copy.is_by_certificates() {
        return Vec::new();
    }
    let directions = [("leave", &tls.client), ("come", &tls.server)];
    let problem = |(direction, able): (&str, &Result<(), NoCopyTls>)| {
        let why = able.as_ref().err()?;
        Some(format!(
            "QEMU cannot encrypt the memory of VMs that {direction}: {why}; see libvirt.encrypt"
        ))
    };
    directions.into_iter().filter_map(problem).collect()
}

fn handover_rows(reports: &BTreeMap<u32, HoldReport>) -> Vec<HandoverRow> {
    let row = |nic: u32, flow: &FlowReport| {
        let stream = flow.stream?;
        Some(HandoverRow {
            nic,
            vlan: stream.vlan,
            multicast_address: stream.multicast_address.into(),
            source: stream.source.into(),
            source_port: stream.source_port,
            destination_port: stream.destination_port,
            placed: flow.placed.map(|placed| match placed {
                Placed::Fingerprint => Placement::Exact,
                Placed::Estimate => Placement::Estimated,
                Placed::Time => Placement::Time,
                Placed::Unseen => Placement::Unseen,
                Placed::Blind => Placement::Blind,
            }),
            delivered: flow.delivered,
            held: flow.held,
            dropped: flow.dropped,
            replayed: flow.replayed,
            lost: flow.lost,
            duplicated_at_most: flow.duplicates,
            longest_held_ms: fractional(flow.longest_held),
            overflow: flow.overflow,
        })
    };
    (0..)
        .zip(reports.values())
        .flat_map(|(nic, report)| report.flows.iter().map(move |flow| (nic, flow)))
        .filter_map(|(nic, flow)| row(nic, flow))
        .collect()
}

/// Returns the NICs with a fault in the handover.
fn nics(reports: &BTreeMap<u32, HoldReport>) -> Vec<NicRow> {
    let row = |(nic, report): (u32, &HoldReport)| NicRow {
        nic,
        not_held: report.lost_in_kernel,
        has_lapsed: report.has_lapsed,
        tap_full: report.tap_full,
        tap_full_at_source: report.tap_full_at_source.unwrap_or_default(),
    };
    let rows = (0..).zip(reports.values()).map(row);
    rows.filter(|row| !row.is_well()).collect()
}

fn without_gate(nics: &BTreeMap<proto::Mac, Ungated>) -> Vec<UngatedRow> {
    let row = |(mac, reason): (&proto::Mac, &Ungated)| UngatedRow {
        mac: Mac(*mac),
        reason: match reason {
            Ungated::SwitchedOff => UngatedReason::SwitchedOff,
            Ungated::NotMade => UngatedReason::NotMade,
            Ungated::ClosedTooLong => UngatedReason::ClosedTooLong,
            Ungated::RanAlready => UngatedReason::RanAlready,
        },
    };
    nics.iter().map(row).collect()
}

fn session_row(view: &SessionView<'_>, streams: &BTreeMap<StreamKey, Stream>) -> RelaySessionRow {
    let counted = || view.flows.iter().filter_map(|flow| streams.get(flow));
    RelaySessionRow {
        multicast_address: view.key.multicast_address.into(),
        state: match (view.answered, view.standby) {
            (false, _) => RelaySessionState::Asked,
            (true, false) => RelaySessionState::Serving,
            (true, true) => RelaySessionState::Standby,
        },
        address: view.address.map(Ipv6Addr::from),
        flows: u32::try_from(view.flows.len()).unwrap_or(u32::MAX),
        packets: counted().map(|stream| stream.relay.packets).sum(),
        bytes: counted().map(|stream| stream.relay.bytes).sum(),
        lease_left_ms: milliseconds(view.lease_left),
        why: view.why.to_owned(),
    }
}

fn verdict_row(verdict: &Verdict) -> ReceptionRow {
    ReceptionRow {
        vlan: verdict.vlan,
        multicast_address: Ipv6Addr::from(*verdict.multicast_address),
        mode: verdict.mode.into(),
        waited_ms: verdict.waited_ms,
    }
}

fn fractional(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
