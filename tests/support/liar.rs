//! Peers that send arbitrary messages over TLS, without following the protocol.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use common::signal::PeerMessage;
use roamcast::net::tls::TlsFiles;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned,
    version,
};

/// Timeout for an answer, for a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);
/// First frame of an agent to a peer that it accepts.
const ACCEPTED: [u8; 5] = [0, 0, 0, 1, 0];

/// A connection to an agent.
pub struct Liar(StreamOwned<ClientConnection, TcpStream>);

impl Liar {
    /// Connects, in the namespace of the calling thread, with a certificate that the agent accepts.
    pub fn connect(to: SocketAddr, agent: &str, ca: &Path, own: &TlsFiles) -> Self {
        let mut liar = Self::attempt(to, agent, ca, own);
        let mut verdict = ACCEPTED.map(|_| 0xff);
        liar.0.read_exact(&mut verdict).expect("a verdict");
        assert_eq!(verdict, ACCEPTED, "the agent refuses this peer");
        liar
    }

    /// Connects with any certificate and does not wait for the verdict. `ca` is the agent's CA.
    pub fn attempt(to: SocketAddr, agent: &str, ca: &Path, own: &TlsFiles) -> Self {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from_pem_file(ca).unwrap())
            .unwrap();
        let (chain, key) = pair(own);
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        let name = ServerName::try_from(agent.to_owned()).unwrap();
        let connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let stream = TcpStream::connect(to).expect("the agent listens");
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(StreamOwned::new(connection, stream))
    }

    /// Reads silently until the agent closes the connection. Returns the data.
    pub fn listen(mut self) -> Vec<u8> {
        let _ = self.0.flush();
        read_until_closed(&mut self.0)
    }

    /// Sends a frame, even if the agent has closed already, and reads until the agent closes.
    pub fn insist(mut self, frame: &[u8]) -> Vec<u8> {
        let length = u32::try_from(frame.len()).unwrap();
        let _ = self.0.write_all(&[&length.to_be_bytes(), frame].concat());
        let _ = self.0.flush();
        read_until_closed(&mut self.0)
    }

    /// Sends a message as a correct peer does.
    pub fn say(&mut self, transaction: u64, message: impl Into<PeerMessage>) {
        self.say_bytes(&message.into().encode(transaction));
    }

    /// Sends a frame with arbitrary content.
    pub fn say_bytes(&mut self, bytes: &[u8]) {
        let length = u32::try_from(bytes.len()).unwrap();
        self.0.write_all(&length.to_be_bytes()).unwrap();
        self.0.write_all(bytes).unwrap();
        self.0.flush().unwrap();
    }

    /// Waits for the next message.
    pub fn hear(&mut self) -> (u64, PeerMessage) {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).expect("an answer in time");
        let mut bytes = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut bytes).expect("a whole answer");
        PeerMessage::decode(&bytes).expect("a message")
    }

    /// Waits for the answer to a transaction.
    pub fn answer(&mut self, transaction: u64) -> PeerMessage {
        loop {
            let (of, message) = self.hear();
            if of == transaction {
                return message;
            }
        }
    }

    /// Returns the reason with which a transaction is refused.
    pub fn refusal(&mut self, transaction: u64) -> String {
        match self.answer(transaction) {
            PeerMessage::MigrationAbort(abort) => abort.0.text,
            other => panic!("no refusal but {other:?}"),
        }
    }
}

/// A server that an agent dials, and that sends one frame to every client.
pub struct LyingServer {
    listener: TcpListener,
    config: Arc<ServerConfig>,
}

impl LyingServer {
    /// Listens in the namespace of the calling thread.
    pub fn new(own: &TlsFiles) -> Self {
        let (chain, key) = pair(own);
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Self {
            listener: TcpListener::bind("[::1]:0").unwrap(),
            config: Arc::new(config),
        }
    }

    /// Returns the address on which the server listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// Accepts a client, sends the frame and reads until the client closes. Returns the client's
    /// data.
    pub fn serve(&self, frame: &[u8]) -> Vec<u8> {
        let (stream, _) = self.listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        let connection = ServerConnection::new(Arc::clone(&self.config)).unwrap();
        let mut stream = StreamOwned::new(connection, stream);
        let length = u32::try_from(frame.len()).unwrap();
        let _ = stream.write_all(&[&ACCEPTED[..], &length.to_be_bytes(), frame].concat());
        let _ = stream.flush();
        read_until_closed(&mut stream)
    }
}

fn pair(own: &TlsFiles) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    (
        vec![CertificateDer::from_pem_file(&own.certificate).unwrap()],
        PrivateKeyDer::from_pem_file(&own.key).unwrap(),
    )
}

/// Reads until the other side closes the connection, even without TLS close_notify.
fn read_until_closed(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("nobody hangs up: {error}")
        }
        _ => bytes,
    }
}
