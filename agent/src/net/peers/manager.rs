//! The task that owns all connections, and decides which of two crossing connections is kept.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::command::{Command, Inbound, Stream};
use super::connection::{Connection, Params, say_last};
use super::counters::Refusal;
use super::{FromPeer, HANDSHAKE_TIMEOUT, PeerEventSender, Shared, dial};
use crate::net::frames::Verdict;
use crate::proto::PeerEvent;
use crate::role::Role;

/// A running dialing attempt; dropping the value aborts the attempt.
#[derive(Debug)]
struct Dialing {
    id: u64,
    task: AbortHandle,
}

impl Drop for Dialing {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug, Default)]
struct Peer {
    dialing: Option<Dialing>,
    connection: Option<Connection>,
    /// Address that the peer dialed from; `None` if this agent dialed.
    source: Option<IpAddr>,
}

struct Manager {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
    events: PeerEventSender,
    peers: HashMap<String, Peer>,
    last_id: u64,
}

/// Runs until shutdown, or until nobody reads the events.
pub(super) async fn run(
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
    mut inbox: mpsc::UnboundedReceiver<Command>,
    events: PeerEventSender,
) {
    let stop = shared.stop.clone();
    let gone = events.clone();
    let mut manager = Manager {
        shared,
        commands,
        events,
        peers: HashMap::new(),
        last_id: 0,
    };
    loop {
        let command = tokio::select! {
            () = stop.cancelled() => break,
            () = gone.closed() => break,
            command = inbox.recv() => command,
        };
        let Some(command) = command else { break };
        tokio::select! {
            () = stop.cancelled() => break,
            () = manager.handle(command) => {}
        }
    }
    stop.cancel();
}

impl Manager {
    async fn handle(&mut self, command: Command) {
        match command {
            Command::Connect(peer) => self.connect(peer).await,
            Command::Send(peer, bytes) => self.send(peer, bytes).await,
            Command::Inbound(peer, inbound) => self.inbound(peer, inbound).await,
            Command::Dialed { peer, id, result } => self.dialed(peer, id, result).await,
            Command::Closed { peer, id, reason } => self.closed(peer, id, reason).await,
        }
    }

    async fn connect(&mut self, peer: String) {
        let state = self.peers.entry(peer.clone()).or_default();
        if state.connection.is_some() {
            let from = state.source;
            return self.emit(peer, PeerEvent::Up { from }).await;
        }
        if state.dialing.is_some() {
            return;
        }
        self.last_id += 1;
        let id = self.last_id;
        let task = tokio::spawn({
            let shared = Arc::clone(&self.shared);
            let commands = self.commands.clone();
            let peer = peer.clone();
            async move {
                let stop = shared.stop.clone();
                tokio::select! {
                    () = stop.cancelled() => {}
                    result = dial::dial(shared, peer.clone()) => {
                        let result = result.map(|(role, stream)| (role, Box::new(stream)));
                        let _ = commands.send(Command::Dialed { peer, id, result });
                    }
                }
            }
        })
        .abort_handle();
        state.dialing = Some(Dialing { id, task });
    }

    async fn send(&mut self, peer: String, bytes: Vec<u8>) {
        let connection = self
            .peers
            .get(&peer)
            .and_then(|state| state.connection.as_ref());
        let reason = match connection.map(|connection| connection.send(bytes)) {
            Some(Ok(())) => return,
            Some(Err(_)) => {
                self.shared.refuse(&peer, Refusal::NotReading, "");
                self.drop_connection(&peer);
                format!("Agent `{peer}` does not read what is sent to it")
            }
            None => format!("Agent `{peer}` is not connected"),
        };
        self.emit(peer, PeerEvent::Down { reason }).await;
    }

    async fn inbound(&mut self, peer: String, inbound: Inbound) {
        let Inbound {
            source,
            role,
            stream,
        } = inbound;
        let ours_wins = self.shared.config.name < peer;
        let state = self.peers.entry(peer.clone()).or_default();
        // A connection that this agent dialed just now may cross the peer's connection. An older
        // connection cannot: the peer dials again only after it has lost the old one.
        let crossed = state.dialing.is_some()
            || state.connection.as_ref().is_some_and(|connection| {
                connection.dialed && connection.since.elapsed() < HANDSHAKE_TIMEOUT
            });
        if ours_wins && crossed {
            tokio::spawn(say_last(*stream, Verdict::Crossed));
            return;
        }
        state.dialing = None;
        if state.connection.is_some() {
            self.drop_connection(&peer);
            let reason = format!("Agent `{peer}` connected anew");
            self.emit(peer.clone(), PeerEvent::Down { reason }).await;
        }
        self.shared
            .counters
            .accepted
            .fetch_add(1, Ordering::Relaxed);
        self.up(peer, role, Some(source), stream).await;
    }

    async fn dialed(&mut self, peer: String, id: u64, result: Result<(Role, Stream), String>) {
        let Some(state) = self.peers.get_mut(&peer) else {
            return;
        };
        // An inbound connection has replaced this attempt.
        if state.dialing.as_ref().map(|dialing| dialing.id) != Some(id) {
            return;
        }
        state.dialing = None;
        match result {
            Ok((role, stream)) => {
                self.shared.counters.dialed.fetch_add(1, Ordering::Relaxed);
                self.up(peer, role, None, stream).await;
            }
            Err(reason) => self.emit(peer, PeerEvent::Down { reason }).await,
        }
    }

    async fn closed(&mut self, peer: String, id: u64, reason: String) {
        let current = self
            .peers
            .get(&peer)
            .and_then(|state| state.connection.as_ref())
            .map(|connection| connection.id);
        if current == Some(id) {
            self.drop_connection(&peer);
            self.emit(peer, PeerEvent::Down { reason }).await;
        }
    }

    async fn up(&mut self, peer: String, role: Role, source: Option<IpAddr>, stream: Stream) {
        self.last_id += 1;
        let params = Params {
            id: self.last_id,
            peer: peer.clone(),
            role,
            source,
        };
        // `Up` precedes every frame of the connection.
        let up = PeerEvent::Up { from: source };
        self.emit(peer.clone(), up).await;
        let connection = Connection::start(
            Arc::clone(&self.shared),
            params,
            *stream,
            self.commands.clone(),
            self.events.clone(),
        );
        let state = self.peers.entry(peer).or_default();
        state.connection = Some(connection);
        state.source = source;
    }

    fn drop_connection(&mut self, peer: &str) {
        if let Some(state) = self.peers.get_mut(peer)
            && state.connection.take().is_some()
        {
            self.shared.counters.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn emit(&self, peer: String, event: PeerEvent) {
        match &event {
            PeerEvent::Up { .. } => tracing::info!(%peer, "Agent is connected"),
            PeerEvent::Down { reason } => tracing::info!(%peer, %reason, "Agent is not connected"),
            PeerEvent::Frame(_) => {}
        }
        // If the channel is closed, the loop of `run` ends the manager.
        let event = FromPeer {
            peer,
            event,
            _place: None,
        };
        let _ = self.events.send(event).await;
    }
}
