//! Accepts connections: TLS handshake, then role and name of the certificate, then hand-over to the
//! manager.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::{AlertDescription, CertificateError, Error as RustlsError};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsAcceptor, TlsStream, server};

use super::admission::{Identity, identify};
use super::command::{Command, Inbound};
use super::counters::Refusal;
use super::handshakes::{Handshakes, may_be_tls};
use super::{FIRST_BYTES_TIMEOUT, HANDSHAKE_TIMEOUT, Shared, connection, set_timeouts};
use crate::net::frames::frames;
use crate::net::tls::certificate_names;
use crate::role::{Role, RoleError};

/// Pause after an error of `accept(2)`, for instance when the process has too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections until shutdown.
pub(super) async fn run(
    shared: Arc<Shared>,
    listener: TcpListener,
    commands: mpsc::UnboundedSender<Command>,
) {
    let handshakes = Handshakes::default();
    loop {
        let accepted = tokio::select! {
            () = shared.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if shared.admission().log_now("accept") {
                    tracing::warn!(%error, "Cannot accept connections of agents");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let source = from.ip().to_canonical();
        let who = source.to_string();
        if !shared.admission().may_try(source, Instant::now()) {
            shared.refuse(&who, Refusal::BackedOff, "it failed too often");
            continue;
        }
        let place = match handshakes.take(source, shared.is_known(source)) {
            Ok(place) => place,
            Err(no_place) => {
                shared.refuse(&who, Refusal::TooMany, no_place.as_str());
                continue;
            }
        };
        let shared = Arc::clone(&shared);
        let commands = commands.clone();
        tokio::spawn(async move {
            let stop = shared.stop.clone();
            tokio::select! {
                () = stop.cancelled() => {}
                () = handshake(&shared, stream, from, source, &commands) => {}
            }
            drop(place);
        });
    }
}

async fn handshake(
    shared: &Arc<Shared>,
    stream: TcpStream,
    from: SocketAddr,
    source: IpAddr,
    commands: &mpsc::UnboundedSender<Command>,
) {
    let refuse = |who: &str, refusal, detail: &str| {
        shared.admission().failed(source, Instant::now());
        shared.refuse(who, refusal, detail);
    };
    let address = source.to_string();
    if let Err(error) = set_timeouts(&stream) {
        return refuse(&address, Refusal::HungUp, &error.to_string());
    }
    // Peeks before TLS, which costs no computation: a silent client occupies its place only for a
    // short time.
    let mut first = [0; 2];
    match timeout(FIRST_BYTES_TIMEOUT, stream.peek(&mut first)).await {
        Ok(Ok(length)) if may_be_tls(&first[..length.min(first.len())]) => {}
        Ok(Ok(_)) => return refuse(&address, Refusal::NotTls, "it does not begin with TLS"),
        Ok(Err(error)) => return refuse(&address, Refusal::HungUp, &error.to_string()),
        Err(_) => return refuse(&address, Refusal::HandshakeTimeout, "it said nothing"),
    }
    let acceptor = TlsAcceptor::from(shared.tls().server);
    let stream = match timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return refuse(&address, classify(&error), &error.to_string()),
        Err(_) => return refuse(&address, Refusal::HandshakeTimeout, "it did not go on"),
    };
    let (names, role) = certified(&stream);
    let frames = frames(TlsStream::Server(stream));
    let (own, own_role) = (&shared.config.name, shared.role);
    let role = match role {
        Ok(role) => role,
        Err(error) => {
            let name = names.first().map_or("", String::as_str);
            refuse(name, Refusal::NoRole, &address);
            let reason =
                format!("The certificate of `{name}` {error}; issue one by `roamcast pki issue`");
            return connection::refuse(frames, reason).await;
        }
    };
    match identify(&names, role, own_role, &shared.config) {
        Identity::Peer(peer) => {
            shared.admission().succeeded(source, Instant::now());
            tracing::debug!(%peer, %from, "Agent connects");
            let inbound = Inbound {
                source,
                role,
                stream: Box::new(frames),
            };
            let _ = commands.send(Command::Inbound(peer, inbound));
        }
        Identity::Own => {
            refuse(own, Refusal::OwnName, &address);
            connection::refuse(frames, format!("The name `{own}` is this agent's own")).await;
        }
        Identity::Misplaced(name) => {
            refuse(&name, Refusal::WrongRole, &address);
            let reason = format!(
                "The certificate of `{name}` is of the role {role}, which {own_role} `{own}` takes no connection from"
            );
            connection::refuse(frames, reason).await;
        }
        Identity::Stranger(name) => {
            refuse(&name, Refusal::NotAdmitted, &address);
            let reason = format!("Agent `{own}` does not admit `{name}`; add it to its peers");
            connection::refuse(frames, reason).await;
        }
    }
}

/// Returns the names and the role in the peer's certificate.
fn certified(stream: &server::TlsStream<TcpStream>) -> (Vec<String>, Result<Role, RoleError>) {
    let (_, connection) = stream.get_ref();
    match connection.peer_certificates().and_then(<[_]>::first) {
        Some(certificate) => (
            certificate_names(certificate),
            Role::of_certificate(certificate),
        ),
        None => (Vec::new(), Err(RoleError::Missing)),
    }
}

/// Maps the error of a failed handshake to its counter.
fn classify(error: &io::Error) -> Refusal {
    let inner = error
        .get_ref()
        .and_then(|error| error.downcast_ref::<RustlsError>());
    match inner {
        None => Refusal::HungUp,
        Some(RustlsError::NoCertificatesPresented) => Refusal::NoCertificate,
        Some(RustlsError::InvalidCertificate(
            CertificateError::Expired
            | CertificateError::ExpiredContext { .. }
            | CertificateError::NotValidYet
            | CertificateError::NotValidYetContext { .. },
        )) => Refusal::Expired,
        Some(RustlsError::InvalidCertificate(CertificateError::Revoked)) => Refusal::Revoked,
        Some(RustlsError::InvalidCertificate(_)) => Refusal::BadCertificate,
        Some(
            RustlsError::PeerIncompatible(_)
            | RustlsError::AlertReceived(AlertDescription::ProtocolVersion),
        ) => Refusal::TlsVersion,
        Some(RustlsError::AlertReceived(_)) => Refusal::RefusedByPeer,
        Some(_) => Refusal::NotTls,
    }
}
