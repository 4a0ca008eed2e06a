//! The agent's configuration: one TOML file, which the agent reads once at its start.
//!
//! `dist/roamcast.toml` documents every key. The reader checks each value, so a [`Config`] that
//! exists is usable. An error names the file, the line and the key. The reader refuses unknown
//! keys: otherwise a misspelt limit would silently be the default.

mod handover;
mod ims;
mod locate;
mod mcs;
mod mobility;
mod relay;
mod relays;
mod section;
mod value;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

pub use handover::Handover;
pub use ims::{
    DEFAULT_IMS_SOCKET, Ims, ImsConfig, ImsLimits, ImsMapping, home_conflict, server_conflict,
};
pub use mcs::{DEFAULT_MCS_SOCKET, McsConfig};
pub use mobility::Mobility;
pub use relay::{DEFAULT_RELAY_SOCKET, Relay, RelayConfig, RelayLimits};
pub use relays::{Relays, Sdp};
pub(crate) use section::DEFAULT_CONTROL_SOCKET;
pub use section::{Agent, Destination, Libvirt, Limits, Log, LogFormat, Peer, Tls};

use crate::proto::Policy;

/// Largest configuration file that the reader accepts, bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Former keys, and where their values stand now.
const MOVED: [(&str, &str); 1] = [(
    "limits.incoming",
    "arrivals_at_once, and arrivals_per_peer, in [policy]",
)];

/// The agent's whole configuration file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `[agent]`: name of this agent, its bridge and its sockets.
    pub agent: Agent,
    /// `[limits]`: resources for one VM and for all VMs.
    #[serde(default)]
    pub limits: Limits,
    /// `[tls]`: certificates for the connections between agents.
    #[serde(default)]
    pub tls: Tls,
    /// `[[peers]]`: agents of other hosts.
    #[serde(default)]
    pub peers: Vec<Peer>,
    /// `[policy]`: which peers may have which domains migrated, where to, and how often.
    #[serde(default)]
    pub policy: Policy,
    /// `[destination]`: how this host receives arriving domains.
    #[serde(default)]
    pub destination: Destination,
    /// `[handover]`: how a migration neither loses nor doubles a packet.
    #[serde(default)]
    pub handover: Handover,
    /// `[mobility]`: unicast addresses of migrating VMs.
    #[serde(default)]
    pub mobility: Mobility,
    /// `[relay]`: relays for streams that do not arrive natively.
    #[serde(default)]
    pub relay: Relays,
    /// `[libvirt]`: how libvirt migrates domains away.
    #[serde(default)]
    pub libvirt: Libvirt,
    /// `[log]`: level and format of the log.
    #[serde(default)]
    pub log: Log,
}

/// Why the reader refuses a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Reading the file failed.
    #[error("Cannot read the configuration {}", path.display())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: std::io::Error,
    },
    /// The file is larger than any configuration.
    #[error("The configuration {} has more than {MAX_FILE_BYTES} bytes; name the right file", path.display())]
    TooLong {
        /// Path of the file.
        path: PathBuf,
    },
    /// A value, key or the syntax is wrong.
    #[error("{}:{line}: {}{message}", path.display(), prefixed(key))]
    Invalid {
        /// Path of the file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
        /// Dotted key (`agent.name`); empty if the syntax is wrong.
        key: String,
        /// What is wrong, in one sentence.
        message: String,
    },
}

fn prefixed(key: &str) -> String {
    if key.is_empty() {
        String::new()
    } else {
        format!("{key}: ")
    }
}

/// A violated rule between several keys, and its place.
struct Conflict {
    /// Path of the value to blame; a number is an index of an array.
    path: Vec<String>,
    message: String,
}

impl Conflict {
    fn new(path: &[&str], message: String) -> Self {
        Self {
            path: path.iter().map(|&key| key.to_owned()).collect(),
            message,
        }
    }
}

/// A kind of configuration file: agent, relay, mapping server or migration control server.
trait ConfigFile: DeserializeOwned {
    /// Returns the first violated rule between several keys.
    fn conflict(&self) -> Option<Conflict>;

    /// Brings values with several spellings into one form.
    fn normalize(&mut self) {}
}

fn load<T: ConfigFile>(path: &Path) -> Result<T, ConfigError> {
    let read_error = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let length = std::fs::metadata(path).map_err(read_error)?.len();
    if length > MAX_FILE_BYTES {
        return Err(ConfigError::TooLong {
            path: path.to_owned(),
        });
    }
    let text = std::fs::read_to_string(path).map_err(read_error)?;
    parse(&text, path)
}

fn parse<T: ConfigFile>(text: &str, path: &Path) -> Result<T, ConfigError> {
    let invalid = |(line, key), message: &str| ConfigError::Invalid {
        path: path.to_owned(),
        line,
        key,
        message: locate::sentence(message),
    };
    let mut config: T = toml::from_str(text).map_err(|error| {
        let (line, key) = locate::of_span(text, error.span().unwrap_or_default());
        let moved = MOVED.iter().find(|(before, _)| *before == key);
        let message = match moved {
            Some((_, now)) => format!("This key has another name now; write {now} instead"),
            None => error.message().to_owned(),
        };
        invalid((line, key), &message)
    })?;
    config.normalize();
    match config.conflict() {
        None => Ok(config),
        Some(conflict) => Err(invalid(
            locate::of_path(text, &conflict.path),
            &conflict.message,
        )),
    }
}

impl Config {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]: the file is unreadable, oversized or invalid.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        load(path)
    }

    /// Checks the text of a file. Errors name `path`; the function does not open it.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        parse(text, path)
    }

    /// Finds a peer by its name.
    pub fn peer(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name.as_str() == name)
    }

    /// Returns true if the policy lets no domain leave or arrive: the operator has not written a
    /// rule yet.
    pub fn lets_nothing_move(&self) -> bool {
        self.policy.departures.is_empty() && self.policy.arrivals.is_empty()
    }
}

impl ConfigFile for Config {
    /// Puts patterns for agent names into lower case, like the names.
    fn normalize(&mut self) {
        let destinations = self.policy.departures.iter_mut();
        let sources = self.policy.arrivals.iter_mut();
        let patterns = destinations
            .flat_map(|rule| &mut rule.destinations)
            .chain(sources.flat_map(|rule| &mut rule.sources));
        for pattern in patterns {
            *pattern = pattern.to_lowercase();
        }
    }

    fn conflict(&self) -> Option<Conflict> {
        let conflict = |path: &[&str], message| Some(Conflict::new(path, message));
        let mut names = BTreeSet::new();
        for (i, peer) in self.peers.iter().enumerate() {
            let path = ["peers", &i.to_string(), "name"];
            if peer.name == self.agent.name {
                return conflict(
                    &path,
                    format!(
                        "Peer \"{}\" has this agent's own name; list the others only",
                        peer.name
                    ),
                );
            }
            if !names.insert(&peer.name) {
                return conflict(&path, format!("Peer \"{}\" is listed twice", peer.name));
            }
        }
        if let Some(key) = self.policy.conflict() {
            return conflict(
                &["policy", key],
                "One peer cannot have more places than there are for all; raise the number at once"
                    .to_owned(),
            );
        }
        if let Some(conflict) = self.relay.conflict(&self.agent.name) {
            return Some(conflict);
        }
        let mut uplinks = BTreeSet::new();
        for (i, uplink) in self.agent.uplinks.iter().enumerate() {
            let path = ["agent", "uplinks", &i.to_string()];
            if *uplink == self.agent.bridge {
                return conflict(
                    &path,
                    format!("Uplink \"{uplink}\" is the bridge itself; name its physical port"),
                );
            }
            if !uplinks.insert(uplink) {
                return conflict(&path, format!("Uplink \"{uplink}\" is listed twice"));
            }
        }
        if let (Some(prefix), Some(address)) = (self.agent.prefix, self.agent.address)
            && !prefix.contains(address)
        {
            return conflict(
                &["agent", "address"],
                format!("Address {address} is not in agent.prefix {prefix}"),
            );
        }
        self.libvirt
            .migrate_flags()
            .err()
            .and_then(|error| conflict(&["libvirt", "flags"], error.to_string()))
            .or_else(|| {
                let why = self.libvirt.encrypt_conflict()?;
                conflict(&["libvirt", "encrypt"], why.to_owned())
            })
            .or_else(|| {
                (self.limits.listeners > self.limits.map_listeners)
                    .then(|| {
                        conflict(
                            &["limits", "listeners"],
                            format!(
                                "{} listeners for one VM do not fit into limits.map_listeners = {}",
                                self.limits.listeners, self.limits.map_listeners
                            ),
                        )
                    })
                    .flatten()
            })
    }
}

#[cfg(test)]
mod tests;
