//! A peer with a good certificate that says what it likes: TLS and CBOR, and no rules.
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

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::signal::PeerMessage;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, version};

/// How long an answer may take, however busy the machine is.
const DEADLINE: Duration = Duration::from_secs(30);
/// What an agent says first to a peer that it takes.
const ACCEPTED: [u8; 5] = [0, 0, 0, 1, 0];

/// A connection to an agent.
pub(crate) struct Liar(StreamOwned<ClientConnection, TcpStream>);

impl Liar {
    /// Connects, in the namespace of the calling thread, with a certificate and its key.
    pub(crate) fn connect(to: SocketAddr, agent: &str, files: [&Path; 3]) -> Self {
        let [ca, certificate, key] = files;
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(ca).unwrap())
            .unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(certificate).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap();
        let name = ServerName::try_from(agent.to_owned()).unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let stream = TcpStream::connect(to).expect("the agent listens");
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut liar = Self(StreamOwned::new(connection, stream));
        let mut verdict = ACCEPTED.map(|_| 0xff);
        liar.0.read_exact(&mut verdict).expect("a verdict");
        assert_eq!(verdict, ACCEPTED, "the agent refuses this peer");
        liar
    }

    pub(crate) fn say(&mut self, transaction: u64, message: impl Into<PeerMessage>) {
        self.say_bytes(&message.into().encode(transaction));
    }

    /// Says what need not be a message.
    pub(crate) fn say_bytes(&mut self, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).unwrap();
        self.0.write_all(&length.to_be_bytes()).unwrap();
        self.0.write_all(bytes).unwrap();
        self.0.flush().unwrap();
    }

    /// Waits for the next message.
    pub(crate) fn hear(&mut self) -> (u64, PeerMessage) {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).expect("an answer in time");
        let mut bytes = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut bytes).expect("a whole answer");
        PeerMessage::decode(&bytes).expect("a message")
    }

    /// Waits for the answer to a transaction.
    pub(crate) fn answer(&mut self, transaction: u64) -> PeerMessage {
        loop {
            let (of, message) = self.hear();
            if of == transaction {
                return message;
            }
        }
    }

    /// The reason for which a transaction is refused.
    pub(crate) fn refusal(&mut self, transaction: u64) -> String {
        match self.answer(transaction) {
            PeerMessage::MigrationAbort(abort) => abort.reason,
            other => panic!("no refusal but {other:?}"),
        }
    }
}
