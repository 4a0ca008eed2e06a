//! An agent among a host and peers that may do anything within their powers.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use common::event::Change;
use common::maps::{Listener, ListenerKey, Source, SourceKey};
use common::signal::{MAX_DATAGRAM_BYTES, MAX_FRAME_BYTES, PeerMessage, VmMessage};

use super::kernel::{Gate, Kernel};
use crate::proto::handover::HoldReport;
use crate::proto::timer::Timer;
use crate::proto::*;

/// Limit of outputs per input, far more than any input causes in so small a world.
const MAX_OUTPUTS: usize = 1024;
/// Number of the agent's transactions that answers may repeat.
const REMEMBERED: usize = 8;

/// The agent and the effects of its outputs.
pub(super) struct World {
    pub(super) agent: Agent,
    pub(super) now: Timestamp,
    pub(super) kernel: Kernel,
    pub(super) ports: BTreeSet<u32>,
    pub(super) domains: BTreeSet<DomainUuid>,
    /// Peers with an established connection.
    pub(super) connected: BTreeSet<String>,
    /// Peers with a pending connection request.
    pub(super) connecting: BTreeSet<String>,
    /// Migrations whose end the agent has not heard yet.
    pub(super) migrating: BTreeSet<DomainUuid>,
    /// Transactions that the agent used.
    pub(super) transactions: VecDeque<u64>,
    /// Tokens of unanswered flow requests.
    pub(super) tokens: VecDeque<u64>,
    /// Commands without a final reply.
    pub(super) commands: BTreeSet<u64>,
    pub(super) last_command: u64,
}

impl World {
    pub(super) fn new(config: AgentConfig) -> Self {
        let now = Timestamp(1_000_000_000_000);
        let mut agent = Agent::new(config, 1);
        let (client, server) = (Ok(()), Ok(()));
        agent.handle_copy_tls(now, CopyTls { client, server });
        Self {
            agent,
            now,
            kernel: Kernel::default(),
            ports: BTreeSet::new(),
            domains: BTreeSet::new(),
            connected: BTreeSet::new(),
            connecting: BTreeSet::new(),
            migrating: BTreeSet::new(),
            transactions: VecDeque::new(),
            tokens: VecDeque::new(),
            commands: BTreeSet::new(),
            last_command: 0,
        }
    }

    /// Feeds one input and performs all outputs.
    pub(super) fn input(&mut self, input: impl FnOnce(&mut Agent, Timestamp)) {
        input(&mut self.agent, self.now);
        self.settle();
    }

    /// Lets time pass, and runs all due timers.
    pub(super) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.agent.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.input(Agent::handle_timeout);
            let next = self.agent.poll_timeout();
            assert!(
                next.is_none_or(|next| next > self.now),
                "a timer that is due has not been done"
            );
        }
        self.now = end;
    }

    pub(super) fn hypervisor(&mut self, event: HypervisorEvent) {
        match &event {
            HypervisorEvent::Domain(domain) => {
                self.domains.insert(domain.uuid);
            }
            HypervisorEvent::Gone(uuid) => {
                self.domains.remove(uuid);
            }
            HypervisorEvent::MigrationEnded { uuid, .. } => {
                self.migrating.remove(uuid);
            }
            _ => {}
        }
        self.input(|agent, now| agent.handle_hypervisor(now, event));
    }

    pub(super) fn gate(&mut self, event: GateEvent) {
        match &event {
            // A holding gate opens on command only.
            GateEvent::Opened { ifindex, .. } => {
                match self.kernel.gates.get(ifindex) {
                    Some(Gate::Holds) => return,
                    _ => self.kernel.gates.remove(ifindex),
                };
            }
            GateEvent::NotHeld { ifindex } | GateEvent::NotRecorded { ifindex } => {
                self.kernel.gates.remove(ifindex);
            }
            GateEvent::Cut { .. } | GateEvent::RunsOn { .. } | GateEvent::SentOn { .. } => {}
        }
        self.input(|agent, now| agent.handle_gate(now, event));
    }

    pub(super) fn link(&mut self, peer: &str, event: PeerEvent) {
        match &event {
            PeerEvent::Up { .. } => {
                self.connected.insert(peer.to_owned());
                self.connecting.remove(peer);
            }
            PeerEvent::Down { .. } => {
                self.connected.remove(peer);
                self.connecting.remove(peer);
            }
            // A closed connection delivers no frames.
            PeerEvent::Frame(_) if !self.connected.contains(peer) => return,
            PeerEvent::Frame(_) => {}
        }
        self.input(|agent, now| agent.handle_peer(now, peer, event));
    }

    pub(super) fn unplug(&mut self, ifindex: u32) {
        self.ports.remove(&ifindex);
        self.input(|agent, now| agent.handle_port(now, PortEvent::Removed { ifindex }));
        self.kernel.unplug(ifindex);
    }

    pub(super) fn command(&mut self, command: Command) {
        self.last_command += 1;
        let id = self.last_command;
        self.commands.insert(id);
        self.input(|agent, now| agent.handle_command(now, id, command));
    }

    fn settle(&mut self) {
        let mut outputs = 0;
        while let Some(output) = self.agent.poll_output() {
            outputs += 1;
            assert!(outputs < MAX_OUTPUTS, "too many outputs");
            self.kernel.apply(&output);
            self.perform(output);
        }
    }

    fn perform(&mut self, output: Output) {
        match output {
            Output::Datagram { bytes, .. } => {
                assert!(bytes.len() <= MAX_DATAGRAM_BYTES);
                VmMessage::decode(&bytes).expect("a VM understands it");
            }
            Output::Connect { peer } => {
                assert!(!self.connected.contains(&peer), "is connected");
                assert!(self.connecting.insert(peer), "is being connected");
            }
            Output::Frame { peer, bytes } => {
                assert!(self.connected.contains(&peer), "is not connected");
                assert!(bytes.len() <= MAX_FRAME_BYTES);
                let (transaction, _) = PeerMessage::decode(&bytes).expect("a peer understands it");
                self.transactions.push_front(transaction);
                self.transactions.truncate(REMEMBERED);
            }
            Output::Reply { command, reply } => {
                if matches!(reply, CommandReply::Progress { .. }) {
                    assert!(self.commands.contains(&command));
                } else {
                    assert!(self.commands.remove(&command), "answered twice");
                }
            }
            Output::StartMigration { uuid, .. } | Output::FollowMigration { uuid } => {
                self.migrating.insert(uuid);
            }
            Output::ReadStreams { token, .. } => {
                self.tokens.push_front(token);
                self.tokens.truncate(REMEMBERED);
            }
            Output::ReadListeners { listeners, sources } => self.read(&listeners, &sources),
            Output::MdbAdd { ifindex, .. }
            | Output::Gate(GateCommand::Hold { ifindex })
            | Output::Address(_, AddressCommand::Expect { ifindex, .. }) => {
                assert!(self.ports.contains(&ifindex), "for no TAP");
            }
            _ => {}
        }
    }

    /// Answers a read request from the maps, at once, because outputs are performed one by one.
    fn read(&mut self, listeners: &[ListenerKey], sources: &[SourceKey]) {
        let (now, kernel) = (self.now, &self.kernel);
        for key in sources {
            let found = kernel.sources.get(key).copied();
            let event = DatapathEvent::Source {
                change: change(found.is_some()),
                key: *key,
                value: found.unwrap_or(Source::NONE),
            };
            self.agent.handle_datapath(now, event);
        }
        for key in listeners {
            let found = kernel.listeners.get(key).copied();
            let event = DatapathEvent::Listener {
                change: change(found.is_some()),
                key: *key,
                value: found.unwrap_or(Listener::NONE),
            };
            self.agent.handle_datapath(now, event);
        }
    }

    /// Removes all participants, lets time pass, and checks that nothing is left.
    pub(super) fn end(&mut self) {
        let reason = "It is over".to_owned();
        self.input(|agent, now| agent.handle_relays(now, Vec::new()));
        let peers = self.connected.union(&self.connecting);
        let peers: Vec<String> = peers.cloned().collect();
        for peer in peers {
            let reason = reason.clone();
            self.link(&peer, PeerEvent::Down { reason });
        }
        self.end_migrations();
        self.fail_connections();
        self.open_gates();
        self.pass_with_failures(self.agent.config().timing.gate_max * 2);
        self.open_gates();
        let closed = self.kernel.gates.values().any(|gate| *gate == Gate::Holds);
        assert!(!closed, "a gate stays closed: {:?}", self.kernel.gates);

        for uuid in self.domains.clone() {
            self.hypervisor(HypervisorEvent::Gone(uuid));
        }
        for ifindex in self.ports.clone() {
            self.unplug(ifindex);
        }
        self.end_migrations();
        self.pass_with_failures(Duration::from_secs(4000));
        self.assert_nothing_left();
    }

    fn end_migrations(&mut self) {
        for uuid in self.migrating.clone() {
            let result = Err("Cancelled".to_owned());
            self.hypervisor(HypervisorEvent::MigrationEnded { uuid, result });
        }
    }

    /// Lets all pending connection requests fail.
    fn fail_connections(&mut self) {
        for peer in std::mem::take(&mut self.connecting) {
            let reason = "Nobody is there".to_owned();
            self.link(&peer, PeerEvent::Down { reason });
        }
    }

    fn pass_with_failures(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.agent.poll_timeout().filter(|due| *due <= end) {
            self.pass(due.since(self.now));
            self.fail_connections();
            self.end_migrations();
            self.open_gates();
        }
        self.now = end;
    }

    /// Completes all replays.
    fn open_gates(&mut self) {
        let gates = self.kernel.gates.clone();
        for (ifindex, _) in gates.iter().filter(|(_, gate)| **gate == Gate::Replays) {
            self.gate(GateEvent::Opened {
                ifindex: *ifindex,
                report: HoldReport::default(),
            });
        }
    }

    fn assert_nothing_left(&mut self) {
        let kernel = &self.kernel;
        assert!(kernel.joined.is_empty(), "{:?}", kernel.joined);
        assert!(kernel.managed.is_empty(), "{:?}", kernel.managed);
        assert!(kernel.mdb.is_empty(), "{:?}", kernel.mdb);
        assert!(kernel.flows.is_empty(), "{:?}", kernel.flows);
        assert!(kernel.gates.is_empty(), "{:?}", kernel.gates);
        assert!(kernel.watched.is_empty(), "{:?}", kernel.watched);
        assert!(kernel.forwards.is_empty(), "{:?}", kernel.forwards);
        assert!(kernel.translations.is_empty(), "{:?}", kernel.translations);
        assert!(kernel.listeners.is_empty(), "{:?}", kernel.listeners);
        assert!(
            self.commands.is_empty(),
            "without answer: {:?}",
            self.commands
        );
        let agent = &mut self.agent;
        assert!(
            agent.machines.arrivals.is_empty(),
            "{:?}",
            agent.machines.arrivals
        );
        assert!(
            agent.machines.departures.is_empty(),
            "{:?}",
            agent.machines.departures
        );
        assert!(
            agent.machines.cx.links.have_nothing_to_tell(),
            "{:?}",
            agent.machines.cx.links
        );
        assert_eq!(agent.view().receptions().count(), 0);
        // The usage timer runs as long as the agent.
        agent.machines.cx.timers.stop(Timer::Usage);
        assert_eq!(
            agent.machines.cx.timers.next(),
            None,
            "{:?}",
            agent.machines.cx.timers
        );
    }
}

fn change(is_there: bool) -> Change {
    if is_there {
        Change::Updated
    } else {
        Change::Removed
    }
}
