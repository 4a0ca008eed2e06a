//! Connections between agents over real sockets: who is let in, who is not, and that nothing is
//! left of those who are not.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    reason = "tests panic, so that they fail with a trace"
)]

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use common::signal::{
    self, DirectoryMessage, ErrorMessage, MAX_FRAME_BYTES, PeerMessage, Register,
};
use roamcast::net::peers::{Endpoint, Peers, PeersConfig, PeersError};
use roamcast::net::tls::{Tls, TlsFiles};
use roamcast::pki::{self, IssueRequest, Validity};
use roamcast::proto::PeerEvent;
use roamcast::role::Role;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion, version};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Nothing here takes so long, however busy the machine is.
const DEADLINE: Duration = Duration::from_secs(30);

struct Pki {
    directory: TempDir,
}

impl Pki {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        pki::init(directory.path(), "test CA", Validity::days(1)).unwrap();
        Self { directory }
    }

    fn issue(&self, name: &str, role: Role, validity: Validity) -> TlsFiles {
        let request = IssueRequest {
            name: name.to_owned(),
            role,
            addresses: vec![Ipv6Addr::LOCALHOST.into()],
            validity,
        };
        let issued = pki::issue(self.directory.path(), &request).unwrap();
        TlsFiles::from(&issued.signalling)
    }

    fn valid(&self, name: &str) -> TlsFiles {
        self.of_role(name, Role::Agent)
    }

    fn of_role(&self, name: &str, role: Role) -> TlsFiles {
        self.issue(name, role, Validity::days(1))
    }

    fn ca(&self) -> PathBuf {
        self.directory.path().join("signalling/cacert.pem")
    }
}

fn yesterday() -> Validity {
    let mut validity = Validity::days(0);
    validity.not_before -= Duration::from_secs(2 * 86_400);
    validity.not_after -= Duration::from_secs(86_400);
    validity
}

/// Where an agent listens.
fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        role: Role::Agent,
        address: address.to_string(),
    }
}

struct Agent {
    peers: Peers,
    events: mpsc::Receiver<(String, PeerEvent)>,
}

impl Agent {
    fn start(pki: &Pki, name: &str, peers: &[(&str, SocketAddr)], admit: &[&str]) -> Self {
        Self::on(localhost(0), &pki.valid(name), name, peers, admit)
    }

    fn on(
        listen: SocketAddr,
        files: &TlsFiles,
        name: &str,
        peers: &[(&str, SocketAddr)],
        admit: &[&str],
    ) -> Self {
        Self::of_role(Role::Agent, listen, files, name, peers, admit)
    }

    /// One of another role, whose peers are agents.
    fn of_role(
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

    fn new(
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

    fn address(&self) -> SocketAddr {
        self.peers.local_address()
    }

    async fn event(&mut self) -> (String, PeerEvent) {
        timeout(DEADLINE, self.events.recv())
            .await
            .expect("no event in time")
            .expect("peers ended")
    }

    async fn up(&mut self, peer: &str) {
        let (who, event) = self.event().await;
        assert!(
            who == peer && matches!(event, PeerEvent::Up { .. }),
            "{who}: {event:?}"
        );
    }

    async fn down(&mut self, peer: &str) -> String {
        match self.event().await {
            (name, PeerEvent::Down { reason }) if name == peer => reason,
            other => panic!("{other:?}"),
        }
    }

    async fn frame(&mut self, peer: &str) -> Vec<u8> {
        match self.event().await {
            (name, PeerEvent::Frame(bytes)) if name == peer => bytes,
            other => panic!("{other:?}"),
        }
    }

    fn counter(&self, name: &str) -> u64 {
        self.peers
            .counters()
            .into_iter()
            .find_map(|(counter, value)| (counter == name).then_some(value))
            .unwrap_or_else(|| panic!("no counter {name}"))
    }

    async fn counted(&self, name: &str, value: u64) {
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

fn localhost(port: u16) -> SocketAddr {
    (Ipv6Addr::LOCALHOST, port).into()
}

fn message(text: &str) -> Vec<u8> {
    PeerMessage::from(ErrorMessage {
        reason: text.to_owned(),
    })
    .encode(1)
}

/// A TLS client that follows no rules.
fn client(
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

async fn connect(connector: &TlsConnector, agent: &Agent) -> io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(agent.address()).await?;
    let name = ServerName::try_from("vms1").unwrap();
    timeout(DEADLINE, connector.connect(name, stream)).await?
}

/// Reads until the agent hangs up.
async fn read_to_end(stream: &mut TlsStream<TcpStream>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut bytes))
        .await
        .expect("the agent did not hang up");
    bytes
}

/// Connects as a peer does, up to the verdict "accepted".
async fn accepted(pki: &Pki, files: &TlsFiles, agent: &Agent) -> TlsStream<TcpStream> {
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

#[tokio::test]
async fn frames_pass_both_ways_in_order() {
    let pki = Pki::new();
    let mut destination = Agent::start(&pki, "vms2", &[], &["vms?"]);
    let mut source = Agent::start(&pki, "vms1", &[("vms2", destination.address())], &[]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    destination.up("vms1").await;
    for i in 0..100 {
        source.peers.send("vms2", message(&i.to_string()));
    }
    for i in 0..100 {
        assert_eq!(destination.frame("vms1").await, message(&i.to_string()));
    }
    let mut longest = message("");
    longest.resize(MAX_FRAME_BYTES, 0);
    destination.peers.send("vms1", message("first"));
    destination.peers.send("vms1", longest.clone());
    assert_eq!(source.frame("vms2").await, message("first"));
    assert_eq!(source.frame("vms2").await, longest);
}

#[tokio::test]
async fn agents_that_dial_each_other_at_once_keep_one_connection_and_lose_no_frame() {
    let pki = Pki::new();
    let (one, two) = (pki.valid("vms1"), pki.valid("vms2"));
    for _ in 0..20 {
        // Ports have to be known before either starts.
        let ports = [0, 0].map(|_| {
            let listener = std::net::TcpListener::bind(localhost(0)).unwrap();
            listener.local_addr().unwrap()
        });
        let [a, b] = ports;
        let mut source = Agent::on(a, &one, "vms1", &[("vms2", b)], &[]);
        let mut destination = Agent::on(b, &two, "vms2", &[("vms1", a)], &[]);
        source.peers.connect("vms2");
        destination.peers.connect("vms1");
        source.up("vms2").await;
        source.peers.send("vms2", message("from vms1"));
        destination.up("vms1").await;
        destination.peers.send("vms1", message("from vms2"));
        assert_eq!(destination.frame("vms1").await, message("from vms1"));
        assert_eq!(source.frame("vms2").await, message("from vms2"));
        assert_eq!(source.counter("lost"), 0);
        assert_eq!(destination.counter("lost"), 0);
    }
}

#[tokio::test]
async fn peer_that_comes_back_is_up_again() {
    let pki = Pki::new();
    let files = pki.valid("vms2");
    let destination = Agent::on(localhost(0), &files, "vms2", &[], &["vms1"]);
    let address = destination.address();
    let mut source = Agent::start(&pki, "vms1", &[("vms2", address)], &[]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    drop(destination);
    assert!(source.down("vms2").await.contains("`vms2`"));
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(
        reason.contains("`vms2`") && reason.contains("reached"),
        "{reason}"
    );
    let mut destination = Agent::on(address, &files, "vms2", &[], &["vms1"]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    destination.up("vms1").await;
}

#[tokio::test]
async fn connecting_twice_says_up_and_keeps_the_connection() {
    let pki = Pki::new();
    let destination = Agent::start(&pki, "vms2", &[], &["*"]);
    let mut source = Agent::start(&pki, "vms1", &[("vms2", destination.address())], &[]);
    source.peers.connect("vms2");
    source.up("vms2").await;
    source.peers.connect("vms2");
    source.up("vms2").await;
    assert_eq!(destination.counter("accepted"), 1);
}

#[tokio::test]
async fn unknown_and_unconnected_peers_are_named() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &[]);
    agent.peers.connect("vms9");
    assert!(
        agent
            .down("vms9")
            .await
            .contains("`vms9` is not among the peers")
    );
    agent.peers.send("vms9", message(""));
    assert!(agent.down("vms9").await.contains("`vms9` is not connected"));
}

#[tokio::test]
async fn stranger_is_refused_and_told_why() {
    let pki = Pki::new();
    let destination = Agent::start(&pki, "vms2", &[], &["edge-*"]);
    let mut source = Agent::start(&pki, "vms1", &[("vms2", destination.address())], &[]);
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(reason.contains("does not admit `vms1`"), "{reason}");
    destination.counted("not_admitted", 1).await;
}

#[tokio::test]
async fn agent_under_this_agents_own_name_is_refused() {
    let pki = Pki::new();
    let files = pki.valid("vms1");
    let agent = Agent::on(localhost(0), &files, "vms1", &[], &["*"]);
    let connector = client(&pki.ca(), Some(&files), &[&version::TLS13]);
    let mut stream = connect(&connector, &agent).await.unwrap();
    let verdict = read_to_end(&mut stream).await;
    assert_eq!(verdict.get(4), Some(&1), "{verdict:?}");
    agent.counted("own_name", 1).await;

    let tls = Tls::load(&files, "vms1", Role::Agent).unwrap();
    let config = PeersConfig {
        name: "vms1".to_owned(),
        listen: localhost(0),
        peers: [("VMS1".to_owned(), endpoint(localhost(1)))].into(),
        ..PeersConfig::default()
    };
    let error = Peers::start(config, tls, mpsc::channel(1).0).unwrap_err();
    assert!(matches!(error, PeersError::OwnName { .. }));
}

#[tokio::test]
async fn certificates_that_are_missing_expired_or_of_another_ca_are_refused_by_reason() {
    let (pki, other) = (Pki::new(), Pki::new());
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    for (files, counter) in [
        (None, "no_certificate"),
        (
            Some(pki.issue("late", Role::Agent, yesterday())),
            "certificate_expired",
        ),
        (Some(other.valid("vms2")), "bad_certificate"),
    ] {
        let connector = client(&pki.ca(), files.as_ref(), &[&version::TLS13]);
        // In TLS 1.3 the client is done before the server has seen its certificate.
        if let Ok(mut stream) = connect(&connector, &agent).await {
            assert!(read_to_end(&mut stream).await.is_empty());
        }
        agent.counted(counter, 1).await;
    }
    assert_eq!(agent.counter("accepted"), 0);
}

#[tokio::test]
async fn role_that_has_no_reason_to_connect_is_refused_and_told_why() {
    let pki = Pki::new();
    for own in Role::ALL {
        let files = pki.of_role(&format!("to-{own}"), own);
        let agent = Agent::of_role(own, localhost(0), &files, &format!("to-{own}"), &[], &["*"]);
        for role in Role::ALL {
            let name = format!("{role}-to-{own}");
            let files = pki.of_role(&name, role);
            let endpoint = Endpoint {
                role: own,
                address: agent.address().to_string(),
            };
            let peers = [(format!("to-{own}"), endpoint)];
            let mut dialing = Agent::new(role, localhost(0), &files, &name, peers, &[]);
            dialing.peers.connect(&format!("to-{own}"));
            if own.admitted().contains(&role) {
                dialing.up(&format!("to-{own}")).await;
            } else {
                let reason = dialing.down(&format!("to-{own}")).await;
                let why =
                    format!("`{name}` is of the role {role}, which {own} `to-{own}` takes no");
                assert!(reason.contains(&why), "{reason}");
            }
        }
        let admitted = own.admitted().len();
        agent
            .counted("accepted", u64::try_from(admitted).unwrap())
            .await;
        let refused = Role::ALL.len() - admitted;
        agent
            .counted("wrong_role", u64::try_from(refused).unwrap())
            .await;
    }
}

#[tokio::test]
async fn peer_of_another_role_than_was_dialed_for_is_not_talked_to() {
    let pki = Pki::new();
    let destination = Agent::start(&pki, "vms2", &[], &["*"]);
    let files = pki.valid("vms1");
    let endpoint = Endpoint {
        role: Role::Mcs,
        address: destination.address().to_string(),
    };
    let peers = [("vms2".to_owned(), endpoint)];
    let mut source = Agent::new(Role::Agent, localhost(0), &files, "vms1", peers, &[]);
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(
        reason.contains("its certificate is of the role agent") && reason.contains("--role mcs"),
        "{reason}"
    );
    source.counted("wrong_role", 1).await;
}

#[tokio::test]
async fn message_that_the_role_may_not_send_closes_the_connection_with_a_reason() {
    let pki = Pki::new();
    let files = pki.of_role("mcs1", Role::Mcs);
    let mut server = Agent::of_role(Role::Mcs, localhost(0), &files, "mcs1", &[], &["*"]);
    let endpoint = Endpoint {
        role: Role::Mcs,
        address: server.address().to_string(),
    };
    let register = |role| {
        DirectoryMessage::from(Register {
            role,
            address: [1; 16].into(),
            site: String::new(),
            serves: Vec::new(),
        })
        .encode(1)
    };
    let [agent, relay] = [signal::Role::Agent, signal::Role::Relay].map(register);
    let files = pki.of_role("relay1", Role::Relay);
    let peers = [("mcs1".to_owned(), endpoint)];
    let mut client = Agent::new(Role::Relay, localhost(0), &files, "relay1", peers, &[]);
    client.peers.connect("mcs1");
    client.up("mcs1").await;
    server.up("relay1").await;
    client.peers.send("mcs1", relay.clone());
    assert_eq!(server.frame("relay1").await, relay);
    client.peers.send("mcs1", agent);
    let reason = server.down("relay1").await;
    assert!(reason.contains("`relay1` sent Register"), "{reason}");
    client.down("mcs1").await;
    server.counted("forbidden_message", 1).await;
}

#[tokio::test]
async fn peer_whose_certificate_bears_another_name_is_not_talked_to() {
    let pki = Pki::new();
    let wrong = Agent::start(&pki, "vms3", &[], &["*"]);
    let mut source = Agent::start(&pki, "vms1", &[("vms2", wrong.address())], &[]);
    source.peers.connect("vms2");
    let reason = source.down("vms2").await;
    assert!(reason.contains("`vms2`"), "{reason}");
    assert_eq!(wrong.counter("accepted"), 0);
}

#[tokio::test]
async fn certificate_that_is_replaced_is_used_and_ends_no_connection() {
    let pki = Pki::new();
    let own = pki.valid("vms1");
    let mut agent = Agent::on(localhost(0), &own, "vms1", &[], &["*"]);
    let _up = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;

    // What cannot be used changes nothing.
    let key = std::fs::read(&own.key).unwrap();
    std::fs::write(&own.key, "no key").unwrap();
    agent.counted("certificates_unusable", 1).await;
    let files = pki.valid("vms3");
    let connector = client(&pki.ca(), Some(&files), &[&version::TLS13]);
    connect(&connector, &agent).await.unwrap();
    agent.up("vms3").await;
    agent.down("vms3").await;
    std::fs::write(&own.key, key).unwrap();
    agent.counted("certificates_replaced", 1).await;

    // All of another CA, one file after the other.
    let other = Pki::new();
    let new = other.valid("vms1");
    for (from, to) in [
        (&new.ca, &own.ca),
        (&new.certificate, &own.certificate),
        (&new.key, &own.key),
    ] {
        std::fs::copy(from, to).unwrap();
    }
    agent.counted("certificates_replaced", 2).await;
    let _new = accepted(&other, &other.valid("vms4"), &agent).await;
    agent.up("vms4").await;
    let files = pki.valid("vms5");
    let old = client(&other.ca(), Some(&files), &[&version::TLS13]);
    if let Ok(mut stream) = connect(&old, &agent).await {
        assert!(read_to_end(&mut stream).await.is_empty());
    }
    agent.counted("bad_certificate", 1).await;
    // Only `vms3` has hung up.
    assert_eq!(agent.counter("lost"), 1);
    agent.peers.connect("vms2");
    agent.up("vms2").await;
}

#[tokio::test]
async fn other_tls_version_is_refused() {
    let pki = Pki::new();
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    let files = pki.valid("vms2");
    let connector = client(&pki.ca(), Some(&files), &[&version::TLS12]);
    connect(&connector, &agent).await.unwrap_err();
    agent.counted("tls_version", 1).await;
}

#[tokio::test]
async fn plain_text_is_refused() {
    let pki = Pki::new();
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    let mut stream = TcpStream::connect(agent.address()).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut bytes = Vec::new();
    let _ = timeout(DEADLINE, stream.read_to_end(&mut bytes))
        .await
        .unwrap();
    agent.counted("not_tls", 1).await;
}

#[tokio::test]
async fn garbage_as_first_frame_closes_the_connection_with_a_reason() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms2"]);
    let mut stream = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;
    stream.write_all(b"\0\0\0\x04junk").await.unwrap();
    let reason = agent.down("vms2").await;
    assert!(reason.contains("does not speak"), "{reason}");
    assert!(read_to_end(&mut stream).await.is_empty());
    agent.counted("malformed_frame", 1).await;
}

#[tokio::test]
async fn oversized_frame_closes_the_connection_with_a_reason() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms2"]);
    let mut stream = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;
    let length = u32::try_from(MAX_FRAME_BYTES + 1).unwrap();
    stream.write_all(&length.to_be_bytes()).await.unwrap();
    let reason = agent.down("vms2").await;
    assert!(reason.contains("too long"), "{reason}");
    agent.counted("oversized_frame", 1).await;
}

#[tokio::test]
async fn new_connection_of_a_peer_replaces_the_one_it_lost() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms2"]);
    let files = pki.valid("vms2");
    let mut first = accepted(&pki, &files, &agent).await;
    agent.up("vms2").await;
    let mut second = accepted(&pki, &files, &agent).await;
    assert!(agent.down("vms2").await.contains("anew"));
    agent.up("vms2").await;
    assert!(read_to_end(&mut first).await.is_empty());
    let bytes = message("still here");
    let length = u32::try_from(bytes.len()).unwrap();
    second.write_all(&length.to_be_bytes()).await.unwrap();
    second.write_all(&bytes).await.unwrap();
    assert_eq!(agent.frame("vms2").await, bytes);
}

#[tokio::test]
async fn peer_that_does_not_read_is_cut_off() {
    let pki = Pki::new();
    let mut agent = Agent::start(&pki, "vms1", &[], &["vms2"]);
    let _stream = accepted(&pki, &pki.valid("vms2"), &agent).await;
    agent.up("vms2").await;
    for _ in 0..16 {
        agent.peers.send("vms2", vec![0; MAX_FRAME_BYTES]);
    }
    let reason = agent.down("vms2").await;
    assert!(reason.contains("does not read"), "{reason}");
    agent.counted("not_reading", 1).await;
}

#[tokio::test]
async fn strangers_that_fail_on_and_on_have_to_wait() {
    let pki = Pki::new();
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    for _ in 0..32 {
        if let Ok(mut stream) = TcpStream::connect(agent.address()).await {
            let _ = stream.write_all(b"nonsense, and no TLS").await;
            let _ = timeout(DEADLINE, stream.read_to_end(&mut Vec::new())).await;
        }
    }
    assert_eq!(agent.counter("not_tls"), 8);
    assert_eq!(agent.counter("backed_off"), 24);
}

#[tokio::test]
async fn silent_connections_of_a_prefix_are_bounded_and_given_up_and_leave_nothing_behind() {
    let pki = Pki::new();
    let agent = Agent::start(&pki, "vms1", &[], &["*"]);
    let before = descriptors();
    let mut silent = Vec::new();
    for _ in 0..80 {
        silent.push(TcpStream::connect(agent.address()).await.unwrap());
    }
    agent.counted("too_many_handshakes", 64).await;
    agent.counted("handshake_timeout", 16).await;
    drop(silent);
    let wait = async {
        while descriptors() > before {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(DEADLINE, wait).await.expect("descriptors leaked");
}

/// TCP sockets of this process that the listening test agent could have left open. Other tests in
/// this process come and go, so only a growth that stays is a leak.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
