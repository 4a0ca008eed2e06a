//! Dials a peer, with a few attempts.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use common::signal::PORT;
use futures::StreamExt;
use rustls_pki_types::ServerName;
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::time::{sleep, timeout};
use tokio_rustls::{TlsConnector, TlsStream, client};

use super::counters::Refusal;
use super::{Endpoint, HANDSHAKE_TIMEOUT, Shared, Target, set_timeouts};
use crate::net::frames::{Frames, Verdict, frames};
use crate::role::{Role, RoleError};

type Stream = Frames<TlsStream<TcpStream>>;

/// Pauses between the attempts; there is one attempt more than pauses.
const PAUSES: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(1000)];
/// When both sides dial: how long this side waits for the peer's connection.
const CROSSED_WAIT: Duration = Duration::from_secs(2);
/// Time limit of the TCP connection to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// A failed attempt, with the reason as a sentence.
enum Failure {
    /// Another attempt may succeed.
    Retry(String),
    /// Further attempts would fail too.
    Final(String),
}

/// Dials a peer until an attempt succeeds, fails for good, or no attempt is left.
///
/// # Errors
///
/// One sentence for a person that names the peer.
pub(super) async fn dial(shared: Arc<Shared>, peer: String) -> Result<(Role, Stream), String> {
    let Some(target) = shared.target(&peer) else {
        return Err(format!(
            "Agent `{peer}` is not among the peers in the configuration"
        ));
    };
    let mut pauses = PAUSES.into_iter();
    loop {
        let reason = match attempt(&shared, &target).await {
            Ok(frames) => return Ok((target.endpoint.role, frames)),
            Err(Failure::Final(reason)) => return Err(reason),
            Err(Failure::Retry(reason)) => reason,
        };
        match pauses.next() {
            Some(pause) => sleep(pause).await,
            None => return Err(reason),
        }
    }
}

async fn attempt(shared: &Shared, target: &Target) -> Result<Stream, Failure> {
    let Target { name, endpoint } = target;
    let Endpoint { role, address } = endpoint;
    let what = role.title();
    let from = shared.config.relays_from.filter(|_| *role == Role::Relay);
    let stream = connect(address, from).await.map_err(|error| {
        Failure::Retry(format!(
            "{what} `{name}` at {address} cannot be reached: {error}"
        ))
    })?;
    let server_name = ServerName::try_from(name.clone())
        .map_err(|_| Failure::Final(format!("The peer name `{name}` is not a DNS name")))?;
    let late = |_| {
        Failure::Retry(format!(
            "{what} `{name}` at {address} did not answer within {} s",
            HANDSHAKE_TIMEOUT.as_secs()
        ))
    };
    let failed = |error: io::Error| {
        let final_ = matches!(
            error.kind(),
            io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput
        );
        let reason = format!("{what} `{name}` at {address} cannot be talked to: {error}");
        if final_ {
            Failure::Final(reason)
        } else {
            Failure::Retry(reason)
        }
    };
    let connector = TlsConnector::from(shared.tls().client);
    let stream = timeout(HANDSHAKE_TIMEOUT, connector.connect(server_name, stream))
        .await
        .map_err(late)?
        .map_err(failed)?;
    if let Err((refusal, found)) = check_role(&stream, *role) {
        shared.refuse(name, refusal, address);
        return Err(Failure::Final(format!(
            "{what} `{name}` at {address} cannot be talked to: its certificate {found}; issue one for it \
             by `roamcast pki issue DIRECTORY {name} --role {role}`"
        )));
    }
    let mut frames = frames(TlsStream::Client(stream));
    let verdict = timeout(HANDSHAKE_TIMEOUT, frames.next())
        .await
        .map_err(late)?
        .transpose()
        .map_err(failed)?
        .and_then(|bytes| Verdict::decode(&bytes));
    match verdict {
        Some(Verdict::Accepted) => Ok(frames),
        Some(Verdict::Refused(reason)) => Err(Failure::Final(format!(
            "{what} `{name}` refused the connection: {reason}"
        ))),
        Some(Verdict::Crossed) => {
            sleep(CROSSED_WAIT).await;
            Err(Failure::Retry(format!(
                "{what} `{name}` wanted to connect itself, but did not"
            )))
        }
        None => Err(Failure::Retry(format!(
            "{what} `{name}` at {address} hung up"
        ))),
    }
}

/// Checks the role in the peer's certificate before anything is read from the peer.
fn check_role(
    stream: &client::TlsStream<TcpStream>,
    wanted: Role,
) -> Result<(), (Refusal, String)> {
    let (_, connection) = stream.get_ref();
    let certificate = connection.peer_certificates().and_then(<[_]>::first);
    match certificate.map_or(Err(RoleError::Missing), Role::of_certificate) {
        Ok(role) if role == wanted => Ok(()),
        Ok(role) => Err((Refusal::WrongRole, format!("is of the role {role}"))),
        Err(error) => Err((Refusal::NoRole, error.to_string())),
    }
}

async fn connect(address: &str, from: Option<Ipv6Addr>) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in resolve(address).await? {
        match timeout(CONNECT_TIMEOUT, connect_to(address, from)).await {
            Ok(Ok(stream)) => {
                set_timeouts(&stream)?;
                return Ok(stream);
            }
            Ok(Err(error)) => last = error,
            Err(_) => last = io::ErrorKind::TimedOut.into(),
        }
    }
    Err(last)
}

async fn connect_to(address: SocketAddr, from: Option<Ipv6Addr>) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    if let Some(from) = from.filter(|_| address.is_ipv6()) {
        socket.bind((from, 0).into())?;
    }
    socket.connect(address).await
}

/// Parses the address of a peer; `None` if it contains a host name.
pub(super) fn literal(place: &str) -> Option<SocketAddr> {
    // `2001:db8::2` alone is an address, not host and port.
    let alone = place.trim_matches(['[', ']']).parse();
    let alone = alone.map(|address| SocketAddr::new(address, PORT));
    alone.or_else(|_| place.parse()).ok()
}

async fn resolve(address: &str) -> io::Result<Vec<SocketAddr>> {
    if let Some(address) = literal(address) {
        return Ok(vec![address]);
    }
    let has_port = address
        .rsplit_once(':')
        .is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let address = if has_port {
        address.to_owned()
    } else {
        format!("{address}:{PORT}")
    };
    let resolved = timeout(CONNECT_TIMEOUT, lookup_host(address))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the name was not resolved in time"));
    Ok(resolved??.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_are_read_with_and_without_port() {
        for (text, expected) in [
            ("[2001:db8::2]:1234", "[2001:db8::2]:1234"),
            ("[2001:db8::2]", "[2001:db8::2]:47411"),
            ("2001:db8::2", "[2001:db8::2]:47411"),
            ("192.0.2.1", "192.0.2.1:47411"),
            ("192.0.2.1:5", "192.0.2.1:5"),
        ] {
            let expected: SocketAddr = expected.parse().unwrap();
            assert_eq!(resolve(text).await.unwrap(), [expected], "{text}");
            assert_eq!(literal(text), Some(expected), "{text}");
        }
        assert_eq!(literal("vms2.example:1234"), None);
    }
}
