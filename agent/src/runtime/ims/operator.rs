//! What operators do to a mapping server: make its secret, enroll nodes, list them.
//!
//! The store has one user at a time: the server, which then is asked by its socket, or the command.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};

use super::keyfile::{KeyFile, Place};
use super::now;
use super::secret::{self, SecretError};
use super::store::{Store, StoreError};
use common::mat::key::Secret;

use crate::config::{ImsConfig, Prefix, home_conflict, server_conflict};
use crate::control::client::{Client, ClientError};
use crate::control::report::NodeRow;
use crate::control::{Reply, Request};
use crate::proto::ims::{EnrollError, Ims, next_generation};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The node cannot be enrolled.
    #[error(transparent)]
    Enroll(#[from] EnrollError),
    /// The server gave no answer, or said no.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The answer is of another kind than the question.
    #[error("The server answered something else; is it of another version than this program?")]
    Unexpected,
    /// The node would know no server.
    #[error("No server is named; set ims.servers in the configuration, or give --servers")]
    NoServers,
    /// A server that is none.
    #[error("{0}")]
    Server(String),
    /// A home prefix that is none.
    #[error("{0}")]
    Home(String),
    /// A home prefix that this server is not for.
    #[error("{asked} is not in the home prefix {home} of this server")]
    OtherHome {
        /// What was asked for.
        asked: Prefix,
        /// That of the configuration.
        home: Prefix,
    },
    /// The key file cannot be written.
    #[error("Cannot make the key file {}", path.display())]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Who is enrolled, and how.
#[derive(Clone, Debug)]
pub struct Enrollment {
    /// HoA of the node.
    pub hoa: Ipv6Addr,
    /// Home prefix for the node; none for that of the server.
    pub home: Option<Prefix>,
    /// Servers for the node; none for those of the configuration.
    pub servers: Vec<SocketAddrV6>,
    /// Generation of the key; none for the next.
    pub generation: Option<u32>,
    /// Where the key file goes.
    pub output: Option<PathBuf>,
}

/// Enrolls a node, and writes its key file where one is asked for; returns it.
///
/// # Errors
///
/// [`OperatorError`]; nothing is enrolled then, unless it is the file that cannot be written.
pub fn enroll(config: &ImsConfig, request: Enrollment) -> Result<KeyFile, OperatorError> {
    let home = home(config.ims.home, request.home)?;
    let servers = if request.servers.is_empty() {
        config.ims.servers.clone()
    } else {
        request.servers
    };
    if servers.is_empty() {
        return Err(OperatorError::NoServers);
    }
    if let Some(message) = servers.iter().find_map(server_conflict) {
        return Err(OperatorError::Server(message));
    }
    let hoa = request.hoa;
    next_generation(home, hoa, 0, None)?;
    let secret = secret::load(&config.ims.secret)?;
    let key_file = |path: &Path| {
        let path = path.to_owned();
        move |source| OperatorError::KeyFile { path, source }
    };
    // Made first: with a new generation the key that the node has now is void.
    let place = match &request.output {
        Some(path) => Some((Place::new(path).map_err(key_file(path))?, path)),
        None => None,
    };
    let generation = match Client::connect(&config.ims.control_socket) {
        Ok(mut server) => by_server(&mut server, hoa, request.generation)?,
        Err(ClientError::NoAgent { .. }) => {
            let secret = secret::load(&config.ims.secret)?;
            by_store(config, secret, hoa, request.generation)?
        }
        Err(error) => return Err(error.into()),
    };
    let content = KeyFile {
        hoa,
        generation,
        key: secret.node(hoa.octets(), generation),
        home,
        servers,
    };
    if let Some((place, path)) = place {
        place.write(&content).map_err(key_file(path))?;
    }
    Ok(content)
}

fn home(own: Prefix, asked: Option<Prefix>) -> Result<Prefix, OperatorError> {
    let home = asked.unwrap_or(own);
    if let Some(message) = home_conflict(home) {
        return Err(OperatorError::Home(message));
    }
    if home.length < own.length || !own.contains(home.address) {
        return Err(OperatorError::OtherHome {
            asked: home,
            home: own,
        });
    }
    Ok(home)
}

fn by_server(
    server: &mut Client,
    hoa: Ipv6Addr,
    generation: Option<u32>,
) -> Result<u32, OperatorError> {
    let mut enrolled = None;
    server.ask(&Request::Enroll { hoa, generation }, |reply| {
        if let Reply::Enrolled { generation } = reply {
            enrolled = Some(generation);
        }
    })?;
    enrolled.ok_or(OperatorError::Unexpected)
}

fn by_store(
    config: &ImsConfig,
    secret: Secret,
    hoa: Ipv6Addr,
    generation: Option<u32>,
) -> Result<u32, OperatorError> {
    // The server's own rules, for as long as it takes.
    let mut ims = Ims::new(config.protocol(), secret, linux::random::entropy());
    let store = Store::open(&config.ims.store)?;
    let known = store.get(hoa.octets())?;
    ims.restore(now(), known.map(|record| (hoa.octets(), record)));
    ims.enroll(now(), hoa, generation, 0)?;
    let writes = ims.poll_writes();
    store.write(&writes)?;
    ims.handle_stored(now(), &[hoa.octets()], true);
    let enrolled = ims.poll_enrolled().and_then(|it| it.generation);
    enrolled.ok_or(OperatorError::Unexpected)
}

/// All nodes that a server knows, in the order of HoAs.
///
/// # Errors
///
/// [`OperatorError`].
pub fn nodes(config: &ImsConfig) -> Result<Vec<NodeRow>, OperatorError> {
    let mut server = match Client::connect(&config.ims.control_socket) {
        Ok(server) => server,
        Err(ClientError::NoAgent { .. }) => {
            return Ok(rows(&Store::open(&config.ims.store)?, now().wall_ms)?);
        }
        Err(error) => return Err(error.into()),
    };
    let mut rows = Vec::new();
    let mut unexpected = false;
    server.ask(&Request::Nodes, |reply| match reply {
        Reply::Nodes(more) => rows.extend(more),
        _ => unexpected = true,
    })?;
    if unexpected {
        return Err(OperatorError::Unexpected);
    }
    Ok(rows)
}

/// All nodes in a store.
///
/// # Errors
///
/// [`StoreError`].
pub(super) fn rows(store: &Store, wall_ms: u64) -> Result<Vec<NodeRow>, StoreError> {
    let mut rows = Vec::new();
    store.each(|hoa, record| rows.push(NodeRow::new(hoa, &record, wall_ms)))?;
    Ok(rows)
}
