//! The file of an agent. `dist/roamcast.toml` documents every key.

mod handover;
mod libvirt;
mod mobility;
mod relays;
mod sections;

use std::collections::BTreeSet;
use std::path::Path;

use serde::Deserialize;

use super::{ConfigError, ConfigFile, Conflict, Log, Peer, Tls, load, parse};
use crate::proto::Policy;

pub use handover::Handover;
pub use libvirt::Libvirt;
pub use mobility::Mobility;
pub use relays::{Relays, Sdp};
pub use sections::{Agent, Destination, Limits};

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
