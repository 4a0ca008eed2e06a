//! The configuration of a migration control server: a TOML file of its own.
//!
//! `dist/mcs.toml` documents every key. The same rules hold as for the agent's file ([`super`]).

use std::net::SocketAddrV6;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::section::default_listen;
use super::value;
use super::{ConfigError, ConfigFile, Conflict, Log, Tls};
use crate::glob::Glob;
use crate::value::Name;

/// Path of the operator's socket if the configuration sets none.
pub const DEFAULT_MCS_SOCKET: &str = "/run/roamcast-mcs/mcs.sock";

/// The whole configuration file of `roamcast mcs`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct McsConfig {
    /// `[mcs]`: name and sockets of this server.
    pub mcs: Mcs,
    /// `[policy]`: who may register and search.
    #[serde(default)]
    pub policy: McsPolicy,
    /// `[tls]`: certificates of the signalling.
    #[serde(default)]
    pub tls: Tls,
    /// `[log]`: level and format of the log.
    #[serde(default)]
    pub log: Log,
}

/// Name and sockets of the server, and the lifetime of registrations.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mcs {
    /// Name of this server, as in its certificate.
    pub name: Name,
    /// Address and port to which agents and relays connect.
    #[serde(default = "default_listen")]
    pub listen: SocketAddrV6,
    /// Path of the operator's socket.
    #[serde(default = "default_control_socket")]
    pub control_socket: PathBuf,
    /// Lifetime of a registration that is not renewed.
    #[serde(
        rename = "lease_s",
        default = "default_lease",
        deserialize_with = "value::seconds::<5, 3600, _>"
    )]
    pub lease: Duration,
    /// Most registrations at the same time.
    #[serde(
        default = "default_registrations",
        deserialize_with = "value::ranged::<1, 1_000_000, _, _>"
    )]
    pub registrations: u32,
}

/// Who may register and search, by the names in certificates. The server refuses everybody else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct McsPolicy {
    /// Names that may register as an agent and search for relays.
    pub agents: Vec<Glob>,
    /// Names that may register as a relay.
    pub relays: Vec<Glob>,
}

fn default_control_socket() -> PathBuf {
    PathBuf::from(DEFAULT_MCS_SOCKET)
}

fn default_lease() -> Duration {
    Duration::from_secs(60)
}

fn default_registrations() -> u32 {
    4096
}

impl McsConfig {
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

impl ConfigFile for McsConfig {
    fn conflict(&self) -> Option<Conflict> {
        let policy = &self.policy;
        (policy.agents.is_empty() && policy.relays.is_empty()).then(|| {
            Conflict::new(
                &["policy"],
                "Nobody may register; name agents and relays".to_owned(),
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../dist/mcs.toml");

    fn parse(text: &str) -> Result<McsConfig, String> {
        super::super::parse(text, Path::new("m.toml"))
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
        let keys = "name listen control_socket lease_s registrations agents relays ca cert key \
                    admit level format";
        for key in keys.split_whitespace() {
            assert!(EXAMPLE.contains(&format!("{key} = ")), "{key}");
        }
    }

    #[test]
    fn server_that_nobody_may_use_is_refused() {
        let error = parse("[mcs]\nname = \"m\"\n").expect_err("accepted");
        assert!(error.contains("policy: Nobody may register"), "{error}");
        let error = parse("[mcs]\nname = \"m\"\nlease_s = 1\n").expect_err("accepted");
        assert_eq!(error, "m.toml:3: mcs.lease_s: 1 is not in 5 to 3600");
    }
}
