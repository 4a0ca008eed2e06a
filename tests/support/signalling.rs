//! Both ends of the signalling: agents on the real `Peers`, and clients that follow no rules.

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
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A certification authority of the signalling.
pub struct Pki {
    /// Place of the keys and certificates.
    pub directory: TempDir,
}

impl Pki {
    /// Makes an authority.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        pki::init(directory.path(), "test CA", Validity::days(1)).unwrap();
        Self { directory }
    }

    /// Issues a certificate with this validity.
    pub fn issue(&self, name: &str, role: Role, validity: Validity) -> TlsFiles {
        let request = IssueRequest {
            name: name.to_owned(),
            role,
            addresses: vec![Ipv6Addr::LOCALHOST.into()],
            validity,
        };
        let issued = pki::issue(self.directory.path(), &request).unwrap();
        TlsFiles::from(&issued.signalling)
    }

    /// Issues an agent's certificate that is valid now.
    pub fn valid(&self, name: &str) -> TlsFiles {
        self.of_role(name, Role::Agent)
    }

    /// Issues a certificate for a role that is valid now.
    pub fn of_role(&self, name: &str, role: Role) -> TlsFiles {
        self.issue(name, role, Validity::days(1))
    }

    /// Returns the path of the authority's own certificate.
    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("signalling/cacert.pem")
    }
}

/// Returns a validity that ended a day ago.
pub fn yesterday() -> Validity {
    let mut validity = Validity::days(0);
    validity.not_before -= Duration::from_secs(2 * 86_400);
    validity.not_after -= Duration::from_secs(86_400);
    validity
}

/// Returns the endpoint of an agent that listens on `address`.
pub fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        role: Role::Agent,
        address: address.to_string(),
    }
}

/// One end of the signalling.
pub struct Agent {
    /// Connections to all peers.
    pub peers: Peers,
    /// What the connections report.
    pub events: mpsc::Receiver<FromPeer>,
}

impl Agent {
    /// Starts an agent on a free port, with a new certificate.
    pub fn start(pki: &Pki, name: &str, peers: &[(&str, SocketAddr)], admit: &[&str]) -> Self {
        Self::on(localhost(0), &pki.valid(name), name, peers, admit)
    }

    /// Starts an agent with this address and certificate.
    pub fn on(
        listen: SocketAddr,
        files: &TlsFiles,
        name: &str,
        peers: &[(&str, SocketAddr)],
        admit: &[&str],
    ) -> Self {
        Self::of_role(Role::Agent, listen, files, name, peers, admit)
    }

    /// Starts an instance of another role, whose peers are agents.
    pub fn of_role(
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

    /// Starts an instance of a role with peers of any role.
    pub fn new(
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

    /// Returns the address on which the instance listens.
    pub fn address(&self) -> SocketAddr {
        self.peers.local_address()
    }

    /// Waits for the next event. Returns the peer's name with it.
    pub async fn event(&mut self) -> (String, PeerEvent) {
        let from = timeout(DEADLINE, self.events.recv())
            .await
            .expect("no event in time")
            .expect("peers ended");
        (from.peer, from.event)
    }

    /// Waits for the connection to a peer; no other event may come before.
    pub async fn up(&mut self, peer: &str) {
        let (who, event) = self.event().await;
        assert!(
            who == peer && matches!(event, PeerEvent::Up { .. }),
            "{who}: {event:?}"
        );
    }

    /// Waits for the end of the connection to a peer. Returns the reason.
    pub async fn down(&mut self, peer: &str) -> String {
        match self.event().await {
            (name, PeerEvent::Down { reason }) if name == peer => reason,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for a frame of a peer.
    pub async fn frame(&mut self, peer: &str) -> Vec<u8> {
        match self.event().await {
            (name, PeerEvent::Frame(bytes)) if name == peer => bytes.into(),
            other => panic!("{other:?}"),
        }
    }

    /// Returns a counter by name.
    pub fn counter(&self, name: &str) -> u64 {
        self.peers
            .counters()
            .into_iter()
            .find_map(|(counter, value)| (counter == name).then_some(value))
            .unwrap_or_else(|| panic!("no counter {name}"))
    }

    /// Waits until a counter has a value.
    pub async fn counted(&self, name: &str, value: u64) {
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

/// Returns the loopback address with this port.
pub fn localhost(port: u16) -> SocketAddr {
    (Ipv6Addr::LOCALHOST, port).into()
}

/// Returns an encoded message with this text.
pub fn message(text: &str) -> Vec<u8> {
    PeerMessage::from(ErrorMessage(Reason::unspecified(text.to_owned()))).encode(1)
}

/// Makes a TLS client that follows no rules.
pub fn client(
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

/// Connects a client to an agent.
pub async fn connect(connector: &TlsConnector, agent: &Agent) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(agent.address()).await?;
    let name = ServerName::try_from("vms1").unwrap();
    timeout(DEADLINE, connector.connect(name, stream)).await?
}

/// Reads until the agent closes the connection.
pub async fn read_to_end(stream: &mut TlsStream<TcpStream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut bytes))
        .await
        .expect("the agent did not hang up");
    bytes
}

/// Connects as a peer does, up to the verdict "accepted".
pub async fn accepted(pki: &Pki, files: &TlsFiles, agent: &Agent) -> TlsStream<TcpStream> {
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
