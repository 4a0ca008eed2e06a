//! The configuration of a mapping server: a TOML file of its own.
//!
//! `dist/ims.toml` documents every key. The same rules hold as for the agent's file ([`super`]).

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::mat::IMS_PORT;
use serde::Deserialize;

use super::value;
use super::{ConfigError, ConfigFile, Conflict, Log};
use crate::credentials;
use crate::proto::ims;
use crate::value::Prefix;

/// Path of the operator's socket if the configuration sets none.
pub const DEFAULT_IMS_SOCKET: &str = "/run/roamcast-ims/ims.sock";
/// Longest home prefix, bits. The remaining bits of an address number the nodes.
const MAX_HOME_BITS: u8 = 120;

/// The whole configuration file of `roamcast ims`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImsConfig {
    /// `[ims]`: home prefix of the nodes, and addresses and files of the server.
    pub ims: Ims,
    /// `[mapping]`: lifetimes of mappings and answers.
    #[serde(default)]
    pub mapping: ImsMapping,
    /// `[limits]`: requests of one source.
    #[serde(default)]
    pub limits: ImsLimits,
    /// `[log]`: level and format of the log.
    #[serde(default)]
    pub log: Log,
}

/// Home prefix of the nodes, and addresses and files of the server.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ims {
    /// Prefix of all home addresses (HoAs).
    pub home: Prefix,
    /// Address and port to which nodes send.
    #[serde(default = "default_listen")]
    pub listen: SocketAddrV6,
    /// Servers that an enrolled node learns.
    #[serde(default)]
    pub servers: Vec<SocketAddrV6>,
    /// Path of the operator's socket.
    #[serde(default = "default_control_socket")]
    pub control_socket: PathBuf,
    /// File with the secret that all servers of this home prefix share.
    #[serde(default = "default_secret")]
    pub secret: PathBuf,
    /// File with the mappings.
    #[serde(default = "default_store")]
    pub store: PathBuf,
}

/// Lifetimes of mappings and answers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImsMapping {
    /// Largest difference between the time in an update and the server's time.
    #[serde(
        rename = "time_window_s",
        deserialize_with = "value::seconds::<1, 86_400, _>"
    )]
    pub time_window: Duration,
    /// Shortest lifetime of a mapping.
    #[serde(
        rename = "min_lifetime_s",
        deserialize_with = "value::seconds::<1, 86_400, _>"
    )]
    pub min_lifetime: Duration,
    /// Longest lifetime of a mapping.
    #[serde(
        rename = "max_lifetime_s",
        deserialize_with = "value::seconds::<1, 604_800, _>"
    )]
    pub max_lifetime: Duration,
    /// Longest lifetime of an answer.
    #[serde(
        rename = "lookup_lifetime_s",
        deserialize_with = "value::seconds::<1, 86_400, _>"
    )]
    pub lookup_lifetime: Duration,
    /// Lifetime of the answer that a node has no mapping.
    #[serde(
        rename = "negative_lifetime_s",
        deserialize_with = "value::seconds::<1, 3600, _>"
    )]
    pub negative_lifetime: Duration,
}

impl Default for ImsMapping {
    fn default() -> Self {
        Self {
            time_window: Duration::from_secs(120),
            min_lifetime: Duration::from_secs(10),
            max_lifetime: Duration::from_secs(3600),
            lookup_lifetime: Duration::from_secs(60),
            negative_lifetime: Duration::from_secs(5),
        }
    }
}

/// Rate limit for each source address.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImsLimits {
    /// Requests per second of one source address.
    #[serde(deserialize_with = "value::ranged::<1, 10_000_000, _, _>")]
    pub requests_per_second: u32,
    /// Requests of one source address in a burst.
    #[serde(deserialize_with = "value::ranged::<1, 10_000_000, _, _>")]
    pub burst: u32,
    /// Source addresses with a token bucket of their own.
    #[serde(deserialize_with = "value::ranged::<1, 16_777_216, _, _>")]
    pub sources: u32,
}

impl Default for ImsLimits {
    fn default() -> Self {
        Self {
            requests_per_second: 500,
            burst: 2000,
            sources: 65_536,
        }
    }
}

fn default_listen() -> SocketAddrV6 {
    SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, IMS_PORT, 0, 0)
}

fn default_control_socket() -> PathBuf {
    PathBuf::from(DEFAULT_IMS_SOCKET)
}

fn default_secret() -> PathBuf {
    credentials::find_or("ims.secret", "/etc/roamcast/ims.secret")
}

fn default_store() -> PathBuf {
    PathBuf::from("/var/lib/roamcast/ims.redb")
}

impl ImsConfig {
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

    /// Returns the part of the configuration that the protocol needs.
    pub fn protocol(&self) -> ims::Config {
        let (mapping, limits) = (&self.mapping, &self.limits);
        ims::Config {
            home: self.ims.home,
            time_window: mapping.time_window,
            min_lifetime: mapping.min_lifetime,
            max_lifetime: mapping.max_lifetime,
            lookup_lifetime: mapping.lookup_lifetime,
            negative_lifetime: mapping.negative_lifetime,
            requests_per_second: limits.requests_per_second,
            burst: limits.burst,
            sources: usize::try_from(limits.sources).unwrap_or(usize::MAX),
        }
    }
}

/// Returns why a prefix cannot be a home prefix.
pub fn home_conflict(home: Prefix) -> Option<String> {
    let address = home.address;
    if address.is_multicast() || address.is_unspecified() || address.is_unicast_link_local() {
        return Some(format!(
            "HoAs cannot be in {home}; take a part of a unique local prefix, like fd5e:6d61:74::/48"
        ));
    }
    (home.length > MAX_HOME_BITS).then(|| {
        format!(
            "There is no room for HoAs in {home}; take a prefix of at most {MAX_HOME_BITS} bits"
        )
    })
}

/// Returns why nodes cannot reach a server at an address.
pub fn server_conflict(server: &SocketAddrV6) -> Option<String> {
    let address = server.ip();
    (address.is_multicast() || address.is_unspecified() || server.port() == 0)
        .then(|| format!("Nodes cannot send to {server}; write it like [2001:db8::1]:{IMS_PORT}"))
}

impl ConfigFile for ImsConfig {
    fn conflict(&self) -> Option<Conflict> {
        if let Some(message) = home_conflict(self.ims.home) {
            return Some(Conflict::new(&["ims", "home"], message));
        }
        for (i, server) in self.ims.servers.iter().enumerate() {
            if let Some(message) = server_conflict(server) {
                return Some(Conflict::new(&["ims", "servers", &i.to_string()], message));
            }
        }
        let mapping = &self.mapping;
        if mapping.min_lifetime > mapping.max_lifetime {
            return Some(Conflict::new(
                &["mapping", "min_lifetime_s"],
                format!(
                    "{} s is longer than mapping.max_lifetime_s = {}",
                    mapping.min_lifetime.as_secs(),
                    mapping.max_lifetime.as_secs()
                ),
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../dist/ims.toml");
    const MINIMAL: &str = "[ims]\nhome = \"fd5e:6d61:74::/48\"\n";

    fn parse(text: &str) -> Result<ImsConfig, String> {
        super::super::parse(text, Path::new("i.toml"))
            .map_err(|error: ConfigError| error.to_string())
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
        let (example, minimal) = (parse(EXAMPLE).unwrap(), parse(MINIMAL).unwrap());
        assert_eq!(example.mapping, minimal.mapping);
        assert_eq!(example.limits, minimal.limits);
        let keys = "home listen servers control_socket secret store time_window_s min_lifetime_s \
                    max_lifetime_s lookup_lifetime_s negative_lifetime_s requests_per_second \
                    burst sources level format";
        for key in keys.split_whitespace() {
            assert!(EXAMPLE.contains(&format!("{key} = ")), "{key}");
        }
    }

    #[test]
    fn errors_name_line_and_key() {
        let cases = [
            ("hom = 1", "i.toml:3: ims.hom: Unknown field"),
            (
                "servers = [\"[::]:47413\"]",
                "i.toml:3: ims.servers.0: Nodes cannot send to [::]:47413",
            ),
            (
                "[mapping]\nmin_lifetime_s = 60\nmax_lifetime_s = 30",
                "i.toml:4: mapping.min_lifetime_s: 60 s is longer",
            ),
            (
                "[limits]\nburst = 0",
                "i.toml:4: limits.burst: 0 is not in 1 to",
            ),
        ];
        for (line, expected) in cases {
            let error = parse(&format!("{MINIMAL}{line}\n")).expect_err("accepted");
            assert!(error.starts_with(expected), "{error}");
        }
        for (home, expected) in [
            ("fe80::/64", "HoAs cannot be in fe80::/64"),
            ("fd00::1/128", "There is no room for HoAs in fd00::1/128"),
        ] {
            let error = parse(&format!("[ims]\nhome = \"{home}\"\n")).expect_err("accepted");
            assert!(
                error.starts_with(&format!("i.toml:2: ims.home: {expected}")),
                "{error}"
            );
        }
    }
}
