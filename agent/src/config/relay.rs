//! The relay's configuration: a TOML file of its own.
//!
//! `dist/relay.toml` documents every key. The same rules hold as for the agent's file ([`super`]).

use std::collections::BTreeSet;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::section::{MAX_MAP_ENTRIES, Site, default_listen};
use super::value;
use super::{ConfigError, ConfigFile, Conflict, Log, Peer, Tls};
use crate::proto::relay::Rule;
use crate::value::{InterfaceName, Name};

/// Path of the operator's socket if the configuration sets none.
pub const DEFAULT_RELAY_SOCKET: &str = "/run/roamcast-relay/relay.sock";

/// The whole configuration file of `roamcast relay`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelayConfig {
    /// `[relay]`: name of this relay, its interfaces and its sockets.
    pub relay: Relay,
    /// `[limits]`: resources for all agents and for one agent.
    #[serde(default)]
    pub limits: RelayLimits,
    /// `[tls]`: certificates of the signalling.
    #[serde(default)]
    pub tls: Tls,
    /// `[[policy]]`: which agents may ask for which multicast addresses.
    #[serde(default)]
    pub policy: Vec<Rule>,
    /// `[[mcs]]`: migration control servers with which the relay registers.
    #[serde(default)]
    pub mcs: Vec<Peer>,
    /// `[log]`: level and format of the log.
    #[serde(default)]
    pub log: Log,
}

/// Name, interfaces and sockets of the relay, and timers of sessions and flows.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relay {
    /// Name of this relay, as in its certificate.
    pub name: Name,
    /// Interfaces on which the relay receives multicast.
    pub interfaces: Vec<InterfaceName>,
    /// Source address of the copies; `None`: the first interface's global address.
    #[serde(default)]
    pub address: Option<Ipv6Addr>,
    /// Site of this relay. Migration control servers send agents of the same site here first.
    #[serde(default)]
    pub site: Site,
    /// Address and port to which agents connect.
    #[serde(default = "default_listen")]
    pub listen: SocketAddrV6,
    /// Path of the operator's socket.
    #[serde(default = "default_control_socket")]
    pub control_socket: PathBuf,
    /// Directory in a BPF file system for pinned maps and links.
    #[serde(default = "default_pin_root")]
    pub pin_root: PathBuf,
    /// Lifetime of a session that its agent does not renew.
    #[serde(
        rename = "lease_s",
        default = "default_lease",
        deserialize_with = "value::seconds::<5, 3600, _>"
    )]
    pub lease: Duration,
    /// Longest silence of a flow; the relay then removes the flow.
    #[serde(
        rename = "flow_silence_s",
        default = "default_flow_silence",
        deserialize_with = "value::seconds::<10, 86_400, _>"
    )]
    pub flow_silence: Duration,
}

fn default_control_socket() -> PathBuf {
    PathBuf::from(DEFAULT_RELAY_SOCKET)
}

fn default_pin_root() -> PathBuf {
    PathBuf::from("/sys/fs/bpf/roamcast-relay")
}

fn default_lease() -> Duration {
    Duration::from_secs(30)
}

fn default_flow_silence() -> Duration {
    Duration::from_secs(600)
}

/// Resources for all agents and for one agent, and sizes of the maps.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RelayLimits {
    /// Most sessions of all agents together.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub sessions: u32,
    /// Most sessions that one agent may hold.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub sessions_per_agent: u32,
    /// Most flows in one session.
    #[serde(deserialize_with = "value::ranged::<1, 4096, _, _>")]
    pub flows_per_session: u32,
    /// Most sources in one request.
    #[serde(deserialize_with = "value::ranged::<1, 4096, _, _>")]
    pub sources: u32,
    /// Rate of all copies above which the relay accepts no new session, Mbit/s; 0: no limit.
    #[serde(deserialize_with = "value::ranged::<0, 10_000_000, _, _>")]
    pub megabits_per_second: u64,
    /// Rate of the copies to one agent above which the relay accepts no new session from it,
    /// Mbit/s; 0: no limit.
    #[serde(deserialize_with = "value::ranged::<0, 10_000_000, _, _>")]
    pub megabits_per_second_per_agent: u64,
    /// Most flows of one multicast address that the kernel counts.
    #[serde(deserialize_with = "value::ranged::<1, 65_535, _, _>")]
    pub flows_per_address: u16,
    /// Entries of the map `MANAGED`: multicast addresses.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_managed: u32,
    /// Entries of the maps `STREAMS` and `RELAY_STREAMS`: flows.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_streams: u32,
    /// Entries of the maps `RELAY_SUBSCRIBERS` and `RELAY_USAGE`: subscribers of all flows
    /// together.
    #[serde(deserialize_with = "value::ranged::<1, MAX_MAP_ENTRIES, _, _>")]
    pub map_subscribers: u32,
}

impl Default for RelayLimits {
    fn default() -> Self {
        Self {
            sessions: 4096,
            sessions_per_agent: 256,
            flows_per_session: 64,
            sources: 64,
            megabits_per_second: 8000,
            megabits_per_second_per_agent: 1000,
            flows_per_address: 1024,
            map_managed: 4096,
            map_streams: 16_384,
            map_subscribers: 65_536,
        }
    }
}

impl RelayConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]: the file is unreadable, oversized or invalid.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        super::load(path)
    }

    /// Checks the text of a file. Errors name `path`; the function does not open it.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        super::parse(text, path)
    }
}

impl ConfigFile for RelayConfig {
    fn conflict(&self) -> Option<Conflict> {
        let interfaces = &self.relay.interfaces;
        if interfaces.is_empty() {
            return Some(Conflict::new(
                &["relay", "interfaces"],
                "No interface is named; name those that receive multicast".to_owned(),
            ));
        }
        let mut names = BTreeSet::new();
        for (i, interface) in interfaces.iter().enumerate() {
            if !names.insert(interface) {
                return Some(Conflict::new(
                    &["relay", "interfaces", &i.to_string()],
                    format!("Interface \"{interface}\" is listed twice"),
                ));
            }
        }
        let unusable = |address: &Ipv6Addr| {
            address.is_multicast()
                || address.is_unspecified()
                || address.is_loopback()
                || address.is_unicast_link_local()
        };
        if let Some(address) = self.relay.address.filter(unusable) {
            return Some(Conflict::new(
                &["relay", "address"],
                format!("Agents cannot be sent to from {address}; give a global address"),
            ));
        }
        for (i, server) in self.mcs.iter().enumerate() {
            if server.name == self.relay.name {
                let message = format!(
                    "Migration control server \"{}\" has this relay's own name; give it a certificate of its own",
                    server.name
                );
                return Some(Conflict::new(&["mcs", &i.to_string(), "name"], message));
            }
        }
        for (i, rule) in self.policy.iter().enumerate() {
            for (j, prefix) in rule.multicast_addresses.iter().enumerate() {
                if !prefix.address.is_multicast() || prefix.length < 8 {
                    return Some(Conflict::new(
                        &[
                            "policy",
                            &i.to_string(),
                            "multicast_addresses",
                            &j.to_string(),
                        ],
                        format!("{prefix} holds unicast addresses; write it like ff0e::/16"),
                    ));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../dist/relay.toml");
    const MINIMAL: &str = "[relay]\nname = \"r\"\ninterfaces = [\"eth0\"]\n";

    fn parse(text: &str) -> Result<RelayConfig, String> {
        RelayConfig::parse(text, Path::new("r.toml")).map_err(|error| error.to_string())
    }

    fn refusal(text: &str) -> String {
        parse(text).expect_err("accepted")
    }

    #[test]
    fn commented_out_keys_of_the_example_are_the_defaults() {
        let is_key =
            |line: &&str| line.starts_with('#') && !line.starts_with("# ") && line.len() > 1;
        let uncommented: Vec<&str> = EXAMPLE
            .lines()
            .map(|line| if is_key(&line) { &line[1..] } else { line })
            .collect();
        assert_eq!(parse(&uncommented.join("\n")), parse(EXAMPLE));
        assert_eq!(parse(EXAMPLE).unwrap().policy.len(), 1);
        assert_eq!(
            parse(EXAMPLE).unwrap().limits,
            parse(MINIMAL).unwrap().limits
        );
    }

    #[test]
    fn example_mentions_every_key() {
        let keys = "name interfaces site address listen control_socket pin_root lease_s \
            flow_silence_s sessions sessions_per_agent flows_per_session sources \
            megabits_per_second megabits_per_second_per_agent map_managed map_streams \
            map_subscribers ca cert key admit agents multicast_addresses agent_addresses level \
            format";
        for key in keys.split_whitespace() {
            assert!(EXAMPLE.contains(&format!("{key} = ")), "{key}");
        }
    }

    #[test]
    fn errors_name_line_and_key() {
        let cases = [
            ("lease = 5", "r.toml:4: relay.lease: Unknown field"),
            (
                "lease_s = 1",
                "r.toml:4: relay.lease_s: 1 is not in 5 to 3600",
            ),
            (
                "address = \"fe80::1\"",
                "r.toml:4: relay.address: Agents cannot be sent to from fe80::1",
            ),
            (
                "[[policy]]\nagents = [\"*\"]\nmulticast_addresses = [\"2001:db8::/32\"]",
                "r.toml:6: policy.0.multicast_addresses.0: 2001:db8::/32 holds unicast",
            ),
        ];
        for (line, expected) in cases {
            let error = refusal(&format!("{MINIMAL}{line}\n"));
            assert!(error.starts_with(expected), "{error}");
        }
        let error = refusal("[relay]\nname = \"r\"\ninterfaces = []\n");
        assert!(
            error.starts_with("r.toml:3: relay.interfaces: No interface"),
            "{error}"
        );
        let error = refusal("[relay]\nname = \"r\"\ninterfaces = [\"a\", \"a\"]\n");
        assert!(
            error.contains("relay.interfaces.1: Interface \"a\" is listed twice"),
            "{error}"
        );
    }
}
