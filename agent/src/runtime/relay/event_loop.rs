//! The relay's event loop: takes an event, passes it to the protocol and performs the protocol's
//! outputs.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use common::counter::Counter;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::RelayError;
use super::interface::Interface;
use crate::clock::now;
use crate::config::RelayConfig;
use crate::control::server::ControlRequest;
use crate::control::{Reply, request};
use crate::datapath::Datapath;
use crate::datapath::events::Events;
use crate::job::Job;
use crate::net::fd_store::Inherited;
use crate::net::neighbour::Neighbours;
use crate::net::peers::{FromPeer, Peers};
use crate::proto::Timestamp;
use crate::proto::relay::RelayServer;
use crate::runtime::registrar::Registrar;
use crate::runtime::stream_reads::StreamReads;
use crate::runtime::tidy::tidy;
use crate::runtime::trace::Tracing;
use crate::watchdog::Watchdog;

/// Interval at which unused entries are removed from the maps.
const COLLECT_INTERVAL: Duration = Duration::from_secs(30);
/// Interval of the checks of interfaces and routes.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Interval of the checks whether a next hop has answered or the kernel has completed a join.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Longest sleep when no timer is armed.
const IDLE: Duration = Duration::from_secs(3600);

/// Everything that the relay's task owns.
pub(super) struct RelayLoop {
    pub(super) config: RelayConfig,
    pub(super) address: Ipv6Addr,
    pub(super) started: Timestamp,
    pub(super) proto: RelayServer,
    pub(super) datapath: Datapath,
    pub(super) events: Events,
    pub(super) stream_reads: StreamReads,
    /// Removal of unused map entries, on a thread for blocking work.
    pub(super) tidying: Job<()>,
    pub(super) interfaces: Vec<Interface>,
    pub(super) neighbours: Neighbours,
    /// Agents whose next hop has not answered, and the deadline of the answer.
    pub(super) resolving: BTreeMap<Ipv6Addr, Instant>,
    /// Sockets of an earlier process, and the time until which the relay keeps them. By then the
    /// agents have asked again, and new joins replace the sockets.
    pub(super) inherited: Option<(Inherited, Instant)>,
    /// Last reading of the counter of copies dropped because route lookups are disabled.
    pub(super) without_forwarding: u64,
    pub(super) peers: Peers,
    pub(super) peer_events: mpsc::Receiver<FromPeer>,
    pub(super) control: mpsc::Receiver<ControlRequest<request::Relay>>,
    pub(super) registrar: Registrar,
    pub(super) tracing: Tracing,
}

impl RelayLoop {
    /// Runs until the relay loses the datapath.
    pub(super) async fn run(&mut self) -> Result<(), RelayError> {
        let mut collect = interval(COLLECT_INTERVAL);
        collect.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look = interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut watchdog = Watchdog::of_systemd();
        loop {
            self.perform_outputs()?;
            let due = self.due().min(Instant::now() + watchdog.beat());
            tokio::select! {
                event = self.events.next() => self.proto.handle_datapath(now(), event?),
                event = self.stream_reads.next() => self.proto.handle_datapath(now(), event?),
                Some(FromPeer { peer, event, .. }) = self.peer_events.recv() => {
                    if self.registrar.is_server(&peer) {
                        self.registrar.handle_peer(&peer, event, &self.peers);
                    } else {
                        self.proto.handle_peer(now(), &peer, event);
                    }
                }
                Some(request) = self.control.recv() => self.handle_control(request)?,
                again = self.neighbours.keep() => {
                    again.map_err(|error| RelayError::System { what: "netlink", error })?;
                }
                () = sleep_until(due) => self.handle_timeout()?,
                _ = look.tick() => self.look()?,
                _ = collect.tick() => self.collect(),
            }
        }
    }

    /// Returns when the next timer fires.
    fn due(&self) -> Instant {
        let due = [self.proto.poll_timeout(), self.registrar.poll_timeout()];
        let wait = due
            .into_iter()
            .flatten()
            .min()
            .map_or(IDLE, |due| due.since(now()).min(IDLE));
        let soon =
            !self.resolving.is_empty() || self.interfaces.iter().any(Interface::is_unsettled);
        let due = Instant::now() + if soon { wait.min(POLL_INTERVAL) } else { wait };
        match &self.inherited {
            Some((_, until)) => due.min(*until),
            None => due,
        }
    }

    fn handle_timeout(&mut self) -> Result<(), RelayError> {
        self.resolve_again();
        self.registrar.handle_timeout(&self.peers);
        for interface in &mut self.interfaces {
            interface.settle()?;
        }
        let over = |(_, until): &mut (Inherited, Instant)| *until <= Instant::now();
        if let Some((inherited, _)) = self.inherited.take_if(over) {
            inherited.close();
        }
        self.proto.handle_timeout(now());
        Ok(())
    }

    fn handle_control(
        &mut self,
        request: ControlRequest<request::Relay>,
    ) -> Result<(), RelayError> {
        let ControlRequest {
            request,
            replies,
            lines,
        } = request;
        let reply = match request {
            request::Relay::Status => Reply::RelayStatus(Box::new(self.status()?)),
            request::Relay::Streams => Reply::Streams(self.streams()?),
            request::Relay::Trace(trace) => {
                self.tracing.add(trace, replies, lines);
                return Ok(());
            }
        };
        // The send fails if the operator has left.
        let _ = replies.send(reply);
        Ok(())
    }

    /// Checks what changes without an event: routes to agents, and interfaces that were created
    /// again.
    fn look(&mut self) -> Result<(), RelayError> {
        let agents: Vec<Ipv6Addr> = self.neighbours.addresses().collect();
        for agent_address in agents {
            match self.neighbours.resolve(agent_address) {
                Ok(true) => {}
                Ok(false) => tracing::debug!(%agent_address, "Next hop does not answer"),
                Err(error) => tracing::warn!(%agent_address, %error, "Cannot reach an agent"),
            }
        }
        self.renew_interfaces()
    }

    /// Attaches to, and joins on, interfaces that were removed and created again. Sets the sysctl
    /// that the programs need.
    fn renew_interfaces(&mut self) -> Result<(), RelayError> {
        let without_forwarding = self.datapath.counter(Counter::ReplicateNoForwarding)?;
        let refused = without_forwarding > self.without_forwarding;
        self.without_forwarding = without_forwarding;
        for interface in &mut self.interfaces {
            if interface.is_there() {
                interface.attach_again(&self.datapath);
                if refused {
                    let attached = self
                        .datapath
                        .attach_replicate(interface.ifindex, &interface.name);
                    tracing::warn!(
                        mended = attached.is_ok(),
                        "net.ipv6.conf.lo.forwarding was switched off; nothing was relayed"
                    );
                }
                continue;
            }
            if let Err(error) = self.datapath.detach_replicate(interface.ifindex) {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "Nothing to detach from an interface that is gone"
                );
            }
            match Interface::open(&self.datapath, &interface.name) {
                Ok(anew) => *interface = anew,
                Err(error) => {
                    tracing::warn!(
                        interface = interface.name,
                        error = &error as &dyn std::error::Error,
                        "Interface is gone; nothing of it is relayed"
                    );
                    continue;
                }
            }
            for membership in self.proto.memberships() {
                if let Err(error) = interface.join(&membership) {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "Cannot join again"
                    );
                }
            }
        }
        Ok(())
    }

    /// Starts the removal of unused map entries as a job, so that the loop does not wait.
    fn collect(&mut self) {
        let datapath = self.datapath.clone();
        let silence = self.config.relay.flow_silence;
        self.tidying.start(move || tidy(&datapath, silence));
    }
}
