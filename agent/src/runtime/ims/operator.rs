//! Operators' commands for a mapping server: make its secret, enroll nodes, list nodes.
//!
//! Only one process can open the store. While the server runs, the commands ask the server through
//! its socket; otherwise they open the store themselves.

use std::io;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};

use super::keyfile::{KeyFile, Place};
use super::now;
use super::secret::{self, SecretError};
use super::store::{Store, StoreError};
use common::mat::key::Secret;

use crate::config::{ImsConfig, home_conflict, server_conflict};
use crate::control::client::{Client, ClientError};
use crate::control::report::NodeRow;
use crate::control::{Reply, request};
use crate::proto::ims::{EnrollError, Ims, MappingStore, next_generation};
use crate::value::Prefix;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Reading or making the file with the secret failed.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Opening, reading or writing the store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The protocol refuses to enroll the node.
    #[error(transparent)]
    Enroll(#[from] EnrollError),
    /// The server gave no answer or refused the request.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The kind of the answer does not match the request.
    #[error("The server answered something else; is it of another version than this program?")]
    Unexpected,
    /// The node would not know any server.
    #[error("No server is named; set ims.servers in the configuration, or give --servers")]
    NoServers,
    /// Nodes cannot reach a server at this address.
    #[error("{0}")]
    Server(String),
    /// The prefix cannot be a home prefix.
    #[error("{0}")]
    Home(String),
    /// The home prefix is not one of this server.
    #[error("{asked} is not in the home prefix {home} of this server")]
    OtherHome {
        /// Prefix that the operator named.
        asked: Prefix,
        /// Home prefix of the configuration.
        home: Prefix,
    },
    /// Writing the key file failed.
    #[error("Cannot make the key file {}", path.display())]
    KeyFile {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
}

/// Request to enroll a node.
#[derive(Clone, Debug)]
pub struct Enrollment {
    /// Home address of the node.
    pub hoa: Ipv6Addr,
    /// Home prefix for the node; `None`: the server's.
    pub home: Option<Prefix>,
    /// Servers for the node; empty: those of the configuration.
    pub servers: Vec<SocketAddrV6>,
    /// Generation of the key; `None`: the next generation.
    pub generation: Option<u32>,
    /// Path of the key file; `None`: no file.
    pub output: Option<PathBuf>,
}

/// Enrolls a node, writes its key file if the request names a path, and returns the content.
///
/// # Errors
///
/// [`OperatorError`]. The node is not enrolled then, except if only writing the key file failed.
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
    // The file comes first: a new generation invalidates the node's current key.
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
    server.ask(&request::Ims::Enroll { hoa, generation }, |reply| {
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
    // The command follows the server's own rules, with a protocol of its own.
    let mut ims = Ims::new(config.protocol(), secret, linux::random::entropy());
    let store = Store::open(&config.ims.store)?;
    let known = store.get(hoa.octets())?;
    ims.restore(now(), known.map(|record| (hoa.octets(), record)));
    ims.enroll(now(), hoa, generation, 0)?;
    let writes = ims.poll_writes();
    for (write, swapped) in writes.iter().zip(store.swap(&writes)?) {
        ims.handle_swapped(now(), write.hoa, swapped);
    }
    let enrolled = ims.poll_enrolled().and_then(|it| it.generation);
    enrolled.ok_or(OperatorError::Unexpected)
}

/// Returns all nodes of a server in the order of their home addresses.
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
    server.ask(&request::Ims::Nodes, |reply| match reply {
        Reply::Nodes(more) => rows.extend(more),
        _ => unexpected = true,
    })?;
    if unexpected {
        return Err(OperatorError::Unexpected);
    }
    Ok(rows)
}

/// Returns all nodes of a store.
///
/// # Errors
///
/// The store cannot be read.
pub(super) fn rows<S: MappingStore>(store: &S, wall_ms: u64) -> Result<Vec<NodeRow>, S::Error> {
    let mut rows = Vec::new();
    store.load(|hoa, record| rows.push(NodeRow::new(hoa, &record, wall_ms)))?;
    Ok(rows)
}
