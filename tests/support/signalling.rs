//! Both ends of the signalling: agents on the real `Peers`, and clients that follow no rules.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test files, each of which uses a part"
)]
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::signal::{ErrorMessage, PeerMessage, Reason};
use roamcast::net::peers::{Endpoint, FromPeer, Peers, PeersConfig};
use roamcast::net::tls::{Tls, TlsFiles};
use roamcast::pki::{self, IssueRequest, Validity};
use roamcast::proto::PeerEvent;
use roamcast::role::Role;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, version};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Timeout that no step exceeds, even on a busy machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) struct Pki {
    pub(crate) directory: TempDir,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        pki::init(directory.path(), "test CA", Validity::days(1)).unwrap();
        Self { directory }
    }

    pub(crate) fn issue(&self, name: &str, role: Role, validity: Validity) -> TlsFiles {
        let request = IssueRequest {
            name: name.to_owned(),
            role,
            addresses: vec![Ipv6Addr::LOCALHOST.into()],
            validity,
        };
        let issued = pki::issue(self.directory.path(), &request).unwrap();
        TlsFiles::from(&issued.signalling)
    }

    pub(crate) fn valid(&self, name: &str) -> TlsFiles {
        self.of_role(name, Role::Agent)
    }

    pub(crate) fn of_role(&self, name: &str, role: Role) -> TlsFiles {
        self.issue(name, role, Validity::days(1))
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.directory.path().join("signalling/cacert.pem")
    }
}

pub(crate) fn yesterday() -> Validity {
    let mut validity = Validity::days(0);
    validity.not_before -= Duration::from_secs(2 * 86_400);
    validity.not_after -= Duration::from_secs(86_400);
    validity
}

/// Returns the endpoint of an agent that listens on `address`.
pub(crate) fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        role: Role::Agent,
        address: address.to_string(),
    }
}

pub(crate) struct Agent {
    pub(crate) peers: Peers,
    pub(crate) events: mpsc::Receiver<FromPeer>,
}

impl Agent {
    pub(crate) fn start(
        pki: &Pki,
        name: &str,
        peers: &[(&str, SocketAddr)],
        admit: &[&str],
    ) -> Self {
        Self::on(localhost(0), &pki.valid(name), name, peers, admit)
    }

    pub(crate) fn on(
        listen: SocketAddr,
        files: &TlsFiles,
        name: &str,
        peers: &[(&str, SocketAddr)],
        admit: &[&str],
    ) -> Self {
        Self::of_role(Role::Agent, listen, files, name, peers, admit)
    }

    /// Starts an instance of another role, whose peers are agents.
    pub(crate) fn of_role(
        role: Role,
        listen: SocketAddr,
        files: &TlsFiles,
        name: &str,
        peers: &[(&str, SocketAddr)],
        admit: &[&str],
    ) -> Self {
        let peers = peers
            .iter()
            .map(|(name, address)| ((*name).to_owned(), endpoint(*address)));
        Self::new(role, listen, files, name, peers, admit)
    }

    pub(crate) fn new(
        role: Role,
        listen: SocketAddr,
        files: &TlsFiles,
        name: &str,
        peers: impl IntoIterator<Item = (String, Endpoint)>,
        admit: &[&str],
    ) -> Self {
        let config = PeersConfig {
            name: name.to_owned(),
            listen,
            peers: peers.into_iter().collect::<BTreeMap<_, _>>(),
            admit: admit
                .iter()
                .map(|&pattern| pattern.try_into().unwrap())
                .collect(),
            ..PeersConfig::default()
        };
        let (sender, events) = mpsc::channel(16);
        let tls = Tls::load(files, name, role).unwrap();
        let peers = Peers::start(config, tls, sender).unwrap();
        Self { peers, events }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.peers.local_address()
    }

    pub(crate) async fn event(&mut self) -> (String, PeerEvent) {
        let from = timeout(DEADLINE, self.events.recv())
            .await
            .expect("no event in time")
            .expect("peers ended");
        (from.peer, from.event)
    }

    pub(crate) async fn up(&mut self, peer: &str) {
        let (who, event) = self.event().await;
        assert!(
            who == peer && matches!(event, PeerEvent::Up { .. }),
            "{who}: {event:?}"
        );
    }

    pub(crate) async fn down(&mut self, peer: &str) -> String {
        match self.event().await {
            (name, PeerEvent::Down { reason }) if name == peer => reason,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) async fn frame(&mut self, peer: &str) -> Vec<u8> {
        match self.event().await {
            (name, PeerEvent::Frame(bytes)) if name == peer => bytes.into(),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        self.peers
            .counters()
            .into_iter()
            .find_map(|(counter, value)| (counter == name).then_some(value))
            .unwrap_or_else(|| panic!("no counter {name}"))
    }

    pub(crate) async fn counted(&self, name: &str, value: u64) {
        let wait = async {
            while self.counter(name) != value {
                sleep(Duration::from_millis(5)).await;
            }
        };
        if timeout(DEADLINE, wait).await.is_err() {
            panic!("{name} is not {value}: {:?}", self.peers.counters());
        }
    }
}

pub(crate) fn localhost(port: u16) -> SocketAddr {
    (Ipv6Addr::LOCALHOST, port).into()
}

pub(crate) fn message(text: &str) -> Vec<u8> {
    PeerMessage::from(ErrorMessage(Reason::unspecified(text.to_owned()))).encode(1)
}

/// Makes a TLS client that follows no rules.
pub(crate) fn client(
    ca: &PathBuf,
    own: Option<&TlsFiles>,
    versions: &[&'static SupportedProtocolVersion],
) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(ca).unwrap())
        .unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some(files) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(&files.certificate).unwrap()],
                PrivateKeyDer::from_pem_file(&files.key).unwrap(),
            )
            .unwrap(),
    };
    TlsConnector::from(Arc::new(config))
}

pub(crate) async fn connect(
    connector: &TlsConnector,
    agent: &Agent,
) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(agent.address()).await?;
    let name = ServerName::try_from("vms1").unwrap();
    timeout(DEADLINE, connector.connect(name, stream)).await?
}

/// Reads until the agent closes the connection.
pub(crate) async fn read_to_end(stream: &mut TlsStream<TcpStream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut bytes))
        .await
        .expect("the agent did not hang up");
    bytes
}

/// Connects as a peer does, up to the verdict "accepted".
pub(crate) async fn accepted(pki: &Pki, files: &TlsFiles, agent: &Agent) -> TlsStream<TcpStream> {
    let connector = client(&pki.ca(), Some(files), &[&version::TLS13]);
    let mut stream = connect(&connector, agent).await.unwrap();
    let mut verdict = [0xff; 5];
    timeout(DEADLINE, stream.read_exact(&mut verdict))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(verdict, [0, 0, 0, 1, 0]);
    stream
}
