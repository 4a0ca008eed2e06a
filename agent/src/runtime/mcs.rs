//! The running migration control server: connects its directory to the network and the operator.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::clock::now;
use crate::config::McsConfig;
use crate::control::report::{McsStatus, RegistrationRow, age_ms, milliseconds};
use crate::control::server::{ControlError, ControlRequest, ControlServer};
use crate::control::{Reply, request};
use crate::glob::Glob;
use crate::net::peers::{MAX_EVENTS, Peers, PeersConfig, PeersError};
use crate::net::tls::{Tls, TlsError, TlsFiles};
use crate::proto::directory::{Directory, DirectoryConfig};
use crate::proto::{PeerEvent, Timestamp};
use crate::role::Role;
use crate::shutdown::Shutdown;
use crate::watchdog::Watchdog;

/// Operators' requests that may wait for the loop.
const CONTROL_REQUESTS: usize = 16;
/// Longest sleep when no timer is armed.
const IDLE: Duration = Duration::from_secs(3600);

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum McsError {
    /// The TLS files are unusable.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The TCP listener failed.
    #[error(transparent)]
    Peers(#[from] PeersError),
    /// The operator's socket failed.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The system refuses signal handlers.
    #[error("The system refuses signal handlers: {0}")]
    Signals(io::Error),
}

struct Server {
    config: McsConfig,
    started: Timestamp,
    directory: Directory,
    peers: Peers,
}

/// Runs the server until a signal stops it. The server stores nothing: agents and relays register
/// again with its successor.
///
/// # Errors
///
/// See [`McsError`].
pub async fn run(config: McsConfig) -> Result<(), McsError> {
    let mut shutdown = Shutdown::new().map_err(McsError::Signals)?;
    let name = config.mcs.name.as_str();
    let tls = Tls::load(&TlsFiles::from(&config.tls), name, Role::Mcs)?;
    let control = ControlServer::bind(&config.mcs.control_socket)?;
    let (control_sender, mut requests) = mpsc::channel(CONTROL_REQUESTS);
    let (peer_sender, mut peer_events) = mpsc::channel(MAX_EVENTS);
    let peers = Peers::start(peers_config(&config), tls, peer_sender)?;
    tokio::spawn(control.serve(control_sender, std::future::pending()));
    tracing::info!(mcs = name, "Started");
    // Without systemd nobody listens, which is no failure.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let mut server = Server {
        directory: Directory::new(directory_config(&config)),
        started: now(),
        config,
        peers,
    };
    let mut watchdog = Watchdog::of_systemd();
    loop {
        let due = server.due().min(Instant::now() + watchdog.beat());
        tokio::select! {
            Some(from) = peer_events.recv() => server.handle_peer(&from.peer, from.event),
            Some(request) = requests.recv() => server.handle_control(request),
            () = sleep_until(due) => server.directory.handle_timeout(now()),
            signal = shutdown.recv() => {
                tracing::info!(signal, "Stopping");
                return Ok(());
            }
        }
    }
}

fn peers_config(config: &McsConfig) -> PeersConfig {
    let policy = &config.policy;
    PeersConfig {
        name: config.mcs.name.to_string(),
        listen: config.mcs.listen.into(),
        peers: BTreeMap::new(),
        admit: [&policy.agents, &policy.relays, &config.tls.admit]
            .into_iter()
            .flatten()
            .map(Glob::to_lowercase)
            .collect(),
        relays_from: None,
    }
}

fn directory_config(config: &McsConfig) -> DirectoryConfig {
    // Names in certificates arrive in lower case.
    let lower = |globs: &[Glob]| globs.iter().map(Glob::to_lowercase).collect();
    DirectoryConfig {
        name: config.mcs.name.to_string(),
        lease: config.mcs.lease,
        capacity: usize::try_from(config.mcs.registrations).unwrap_or(usize::MAX),
        agents: lower(&config.policy.agents),
        relays: lower(&config.policy.relays),
    }
}

impl Server {
    fn due(&self) -> Instant {
        let wait = self
            .directory
            .poll_timeout()
            .map_or(IDLE, |due| due.since(now()).min(IDLE));
        Instant::now() + wait
    }

    fn handle_peer(&mut self, peer: &str, event: PeerEvent) {
        match event {
            PeerEvent::Up { .. } => tracing::debug!(peer, "Connected"),
            PeerEvent::Down { reason } => tracing::debug!(peer, reason, "Not connected"),
            PeerEvent::Frame(bytes) => self.directory.handle_frame(now(), peer, &bytes),
        }
        while let Some(output) = self.directory.poll_output() {
            self.peers.send(&output.peer, output.bytes);
        }
    }

    fn handle_control(&self, request: ControlRequest<request::Mcs>) {
        let reply = match request.request {
            request::Mcs::Status => Reply::McsStatus(Box::new(self.status())),
        };
        // The send fails if the operator has left.
        let _ = request.replies.send(reply);
    }

    fn status(&self) -> McsStatus {
        let now = now();
        let counters = self.directory.counters();
        let own = [
            ("searches_answered", counters.found),
            ("searches_in_vain", counters.not_found),
            ("messages_refused", counters.refused),
            ("frames_malformed", counters.malformed),
        ];
        McsStatus {
            mcs: self.config.mcs.name.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: age_ms(now, self.started.0),
            lease_ms: milliseconds(self.config.mcs.lease),
            registrations: self
                .directory
                .registrations()
                .map(|(name, known)| RegistrationRow::new(name, known, now))
                .collect(),
            counters: super::counters(own, &self.peers),
        }
    }
}
