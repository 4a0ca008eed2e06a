//! The agent's event loop: takes an event, passes it to the protocol and performs the protocol's
//! outputs.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::net::Ipv6Addr;
use std::path::Path;
use std::time::Duration;

use common::maps::BridgeNumber;
use tokio::sync::mpsc;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until};

use super::RuntimeError;
use super::bridge::{BridgeEvent, Bridges};
use super::gates::Gates;
use super::hooks::{Hooks, Role};
use super::turns::{self, Turns};
use crate::clock::now;
use crate::config::Config;
use crate::control::report::LinkState;
use crate::control::server::ControlRequest;
use crate::control::{Reply, request};
use crate::datapath::Datapath;
use crate::datapath::events::Events;
use crate::hypervisor::copy_tls;
use crate::hypervisor::libvirt::Libvirt;
use crate::job::Job;
use crate::net::links::LinkEvent;
use crate::net::neighbour::Neighbours;
use crate::net::peers::{FromPeer, Peers};
use crate::net::relays::{Discovery, Found};
use crate::net::snooping;
use crate::proto::{
    Agent, DatapathEvent, HypervisorEvent, PeerEvent, Port, PortEvent, RelayCandidate, Timestamp,
};
use crate::runtime::registrar::Registrar;
use crate::runtime::stream_reads::StreamReads;
use crate::runtime::tidy::tidy;
use crate::runtime::trace::Tracing;
use crate::watchdog::Watchdog;

/// Interval at which unused entries are removed from the maps.
const COLLECT_INTERVAL: Duration = Duration::from_secs(30);
/// Longest silence of a flow; its entry is then removed.
const FLOW_SILENCE: Duration = Duration::from_secs(3600);
/// Longest sleep when no timer is armed.
const IDLE: Duration = Duration::from_secs(3600);

/// State of a connection, and the reason if it is down.
pub(super) type State = (LinkState, Option<String>);

/// Everything that the agent's task owns.
pub(super) struct EventLoop {
    pub(super) config: Config,
    pub(super) address: Ipv6Addr,
    pub(super) prefix_length: u8,
    pub(super) started: Timestamp,
    pub(super) turns: Turns,
    pub(super) proto: Agent,
    pub(super) datapath: Datapath,
    pub(super) events: Events,
    pub(super) stream_reads: StreamReads,
    /// Removal of unused map entries, on a thread for blocking work.
    pub(super) tidying: Job<()>,
    pub(super) gates: Gates,
    /// Ports of the bridges, and the programs on them.
    pub(super) hooks: Hooks,
    pub(super) bridges: Bridges,
    /// Next hops of forwarded packets.
    pub(super) neighbours: Neighbours,
    pub(super) peers: Peers,
    pub(super) peer_events: mpsc::Receiver<FromPeer>,
    pub(super) registrar: Registrar,
    pub(super) discovery: Discovery,
    /// Why the agent cannot look for relays in some places.
    pub(super) relay_problems: Vec<String>,
    pub(super) hypervisor: Libvirt,
    pub(super) hypervisor_events: mpsc::UnboundedReceiver<HypervisorEvent>,
    pub(super) control: mpsc::Receiver<ControlRequest<request::Agent>>,
    /// Operators' commands without a complete answer, by the protocol's number of the command.
    pub(super) commands: BTreeMap<u64, mpsc::UnboundedSender<Reply>>,
    pub(super) next_command: u64,
    pub(super) tracing: Tracing,
    pub(super) peer_states: BTreeMap<String, State>,
    pub(super) hypervisor_state: State,
    /// True if the loop has read the maps.
    pub(super) maps_known: bool,
    /// True if the protocol has adopted the state of an earlier agent.
    pub(super) adopted: bool,
}

impl EventLoop {
    /// Runs until the agent loses a part without which it cannot work.
    pub(super) async fn run(&mut self) -> Result<(), RuntimeError> {
        let mut collect = interval(COLLECT_INTERVAL);
        collect.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = Watchdog::of_systemd();
        let mut begun = Instant::now();
        loop {
            self.adopt();
            self.perform_outputs().await?;
            self.turns.add(begun.elapsed());
            let due = self.due().min(Instant::now() + watchdog.beat());
            let (woken, taken) = turns::woken(self.take(due, &mut collect)).await;
            taken?;
            begun = woken;
        }
    }

    /// Waits for one event, and handles it.
    async fn take(&mut self, due: Instant, collect: &mut Interval) -> Result<(), RuntimeError> {
        tokio::select! {
            event = self.bridges.next() => {
                let (bridge, event) = event?;
                self.handle_bridge(bridge, event)?;
            }
            event = self.events.next() => self.handle_datapath(event?),
            event = self.stream_reads.next() => self.handle_datapath(event?),
            Some(event) = self.gates.next() => self.proto.handle_gate(now(), event),
            again = self.neighbours.keep() => if again.map_err(netlink)? {
                self.bridges.announce();
            },
            Some(from) = self.peer_events.recv() => self.handle_peer(from.peer, from.event),
            found = self.discovery.next() => self.handle_relays(found),
            Some(event) = self.hypervisor_events.recv() => self.handle_hypervisor(event),
            Some(request) = self.control.recv() => self.handle_control(request)?,
            notice = self.hooks.next() => {
                let attached = self.hooks.handle_notice(now(), notice.map_err(netlink)?);
                self.tell_ports(attached);
            }
            () = sleep_until(due) => {
                let attached = self.hooks.handle_timeout(now());
                self.tell_ports(attached);
                self.registrar.handle_timeout(&self.peers);
                self.proto.handle_timeout(now());
            }
            _ = collect.tick() => self.collect(),
        }
        Ok(())
    }

    /// Returns when the protocol's next timer fires.
    fn due(&self) -> Instant {
        let due = [
            self.proto.poll_timeout(),
            self.registrar.poll_timeout(),
            self.hooks.poll_timeout(),
        ];
        let wait = due
            .into_iter()
            .flatten()
            .min()
            .map_or(IDLE, |due| due.since(now()).min(IDLE));
        Instant::now() + wait
    }

    fn handle_bridge(
        &mut self,
        bridge: BridgeNumber,
        event: BridgeEvent,
    ) -> Result<(), RuntimeError> {
        match event {
            BridgeEvent::Link(event) => return self.handle_link(event),
            BridgeEvent::Address(event) => self.proto.handle_address(now(), bridge, event),
            BridgeEvent::Datagram(datagram) => {
                let (port, from) = (datagram.mark, datagram.from);
                self.proto
                    .handle_datagram(now(), port, from, &datagram.bytes);
            }
        }
        Ok(())
    }

    fn handle_link(&mut self, event: LinkEvent) -> Result<(), RuntimeError> {
        match event {
            LinkEvent::Port(PortEvent::Added(port)) => {
                if let Err(error) = snooping::learn_no_router(port.ifindex) {
                    tracing::warn!(
                        port = port.name,
                        error = &error as &dyn Error,
                        "The bridge may take this VM for a multicast router and send it every stream"
                    );
                }
                let is_settled = self.is_set_up(&port.name);
                if self.hooks.add(now(), Role::Tap, port.clone(), is_settled) {
                    self.tell_ports(vec![port]);
                }
            }
            LinkEvent::Port(PortEvent::Removed { ifindex }) => {
                tracing::info!(ifindex, "TAP removed");
                self.hooks.remove(ifindex);
                self.gates.removed(ifindex);
                self.datapath.detach_port(ifindex)?;
                self.proto
                    .handle_port(now(), PortEvent::Removed { ifindex });
            }
            LinkEvent::UplinkAdded(port) => {
                self.hooks.add(now(), Role::Uplink, port, true);
            }
            // No traffic is taken in on this port, but relayed packets must not leave through it.
            LinkEvent::OtherAdded(port) => {
                self.hooks.add(now(), Role::Other, port, true);
            }
            LinkEvent::OtherRemoved { ifindex } => {
                self.hooks.remove(ifindex);
                self.datapath.detach_leak(ifindex)?;
            }
            LinkEvent::UplinkRemoved { ifindex } => {
                self.hooks.remove(ifindex);
                self.datapath.detach_uplink(ifindex)?;
                tracing::warn!(ifindex, "Uplink removed");
            }
            LinkEvent::Complete => {
                if self.bridges.are_ports_known() {
                    let [taps, uplinks] =
                        [Role::Tap, Role::Uplink].map(|it| self.hooks.indexes(it));
                    self.datapath.retain(&taps, &uplinks)?;
                }
            }
        }
        Ok(())
    }

    /// Passes TAPs to the protocol once their programs are attached.
    fn tell_ports(&mut self, ports: Vec<Port>) {
        for port in ports {
            self.proto.handle_port(now(), PortEvent::Added(port));
        }
    }

    /// Returns true if libvirt shows a domain with this TAP. libvirt does so after it has set the
    /// TAP's bandwidth limits.
    fn is_set_up(&self, tap: &str) -> bool {
        let mut interfaces = self
            .proto
            .view()
            .domains()
            .flat_map(|domain| &domain.interfaces);
        interfaces.any(|interface| interface.target_dev == tap)
    }

    fn handle_datapath(&mut self, event: DatapathEvent) {
        self.maps_known |= matches!(event, DatapathEvent::Snapshot { .. });
        if let Some(event) = self.bridges.admit(event) {
            self.proto.handle_datapath(now(), event);
        }
    }

    /// Adopts the state of an earlier agent, once, as soon as the protocol knows ports and domains.
    /// The protocol then releases what nobody uses any more.
    fn adopt(&mut self) {
        let ports_known = self.bridges.are_ports_known();
        if !self.adopted && ports_known && self.maps_known && !self.hooks.has_new() {
            self.adopted = true;
            self.proto.handle_adopted(now());
        }
    }

    fn handle_peer(&mut self, peer: String, event: PeerEvent) {
        if self.proto.view().is_relay(&peer) {
            self.proto.handle_peer(now(), &peer, event);
            return;
        }
        match &event {
            PeerEvent::Up { .. } => {
                self.peer_states.insert(peer.clone(), (LinkState::Up, None));
            }
            PeerEvent::Down { reason } => {
                self.peer_states
                    .insert(peer.clone(), (LinkState::Down, Some(reason.clone())));
            }
            PeerEvent::Frame(_) => {}
        }
        if self.registrar.is_server(&peer) {
            if self.registrar.handle_peer(&peer, event, &self.peers) {
                self.relays_told();
            }
            return;
        }
        self.proto.handle_peer(now(), &peer, event);
    }

    /// Handles a change of the relays that migration control servers name.
    fn relays_told(&mut self) {
        if let Some(found) = self.discovery.tell(self.registrar.relays()) {
            self.handle_relays(found);
        }
    }

    fn handle_relays(&mut self, found: Found) {
        self.relay_problems = found.problems;
        let candidates = found.relays.iter().map(|relay| RelayCandidate {
            name: relay.id.clone(),
            address: relay.address.clone(),
            found_by: relay.found_by.clone(),
        });
        let candidates = candidates.collect();
        // Addresses first: the protocol connects at once.
        self.peers.set_relays(&found.relays);
        self.proto.handle_relays(now(), candidates);
    }

    fn handle_hypervisor(&mut self, event: HypervisorEvent) {
        match &event {
            HypervisorEvent::Connected => {
                tracing::info!(uri = self.config.libvirt.uri, "libvirt connected");
                self.hypervisor_state = (LinkState::Up, None);
            }
            HypervisorEvent::Disconnected { reason } => {
                tracing::warn!(reason, "libvirt lost; domains go on running");
                self.hypervisor_state = (LinkState::Down, Some(reason.clone()));
            }
            _ => {}
        }
        self.proto.handle_hypervisor(now(), event);
        if self.hooks.has_new() {
            let set_up: BTreeSet<&str> = self
                .proto
                .view()
                .domains()
                .flat_map(|domain| &domain.interfaces)
                .map(|interface| interface.target_dev.as_str())
                .collect();
            let attached = self.hooks.handle_settled(now(), |tap| set_up.contains(tap));
            self.tell_ports(attached);
        }
    }

    fn handle_control(
        &mut self,
        request: ControlRequest<request::Agent>,
    ) -> Result<(), RuntimeError> {
        let ControlRequest {
            request,
            replies,
            lines,
        } = request;
        match request {
            request::Agent::Status => drop(replies.send(Reply::Status(Box::new(self.status()?)))),
            request::Agent::Listeners => self.send_listeners(&replies),
            request::Agent::Streams => self.send_streams(&replies)?,
            request::Agent::Migrations => self.send_migrations(&replies),
            request::Agent::Relays => self.send_relays(&replies)?,
            request::Agent::Migrate { .. }
            | request::Agent::Abort { .. }
            | request::Agent::Prepare { .. } => {
                if let Some(command) = request.command() {
                    let number = self.next_command;
                    self.next_command += 1;
                    self.commands.insert(number, replies);
                    self.proto.handle_command(now(), number, command);
                }
            }
            request::Agent::Trace(trace) => self.tracing.add(trace, replies, lines),
        }
        Ok(())
    }

    /// Starts the removal of unused map entries as a job, so that the loop does not wait, and
    /// searches at the migration control servers again.
    fn collect(&mut self) {
        self.hooks.survey();
        let copy_tls = copy_tls::find(Path::new("/"));
        self.proto.handle_copy_tls(now(), copy_tls);
        let watched = self.proto.view().modes().map(|view| view.key);
        let wanted = watched
            .filter(|key| key.vlan == 0)
            .map(|key| key.multicast_address)
            .collect();
        self.registrar.search_again(&wanted, &self.peers);
        self.relays_told();
        let datapath = self.datapath.clone();
        self.tidying.start(move || tidy(&datapath, FLOW_SILENCE));
    }
}

fn netlink(error: std::io::Error) -> RuntimeError {
    RuntimeError::System {
        what: "netlink",
        error,
    }
}
