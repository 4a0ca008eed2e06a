//! Key file of a node, which is also its configuration; `roamcast ims enroll` writes it.

use std::fmt;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use common::mat::key::{KEY_BYTES, Key};

use super::core::Identity;

/// Limit of servers; each server receives every update.
const MAX_SERVERS: usize = 8;
/// Range of lifetimes in an update, seconds.
const LIFETIME_S: std::ops::RangeInclusive<u64> = 30..=86_400;
/// Range of forwarding durations, seconds.
const FORWARD_S: std::ops::RangeInclusive<u64> = 1..=300;

/// Why the key file is unusable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// The file cannot be read.
    #[error("Cannot read {}; name the key file that `roamcast ims enroll` has written by --config", path.display())]
    Read {
        /// Path of the key file.
        path: PathBuf,
        /// Error of the read.
        source: std::io::Error,
    },
    /// Other users can read the file.
    #[error("{} holds a key and others can read it; run `chmod 600 {}`", path.display(), path.display())]
    Readable {
        /// Path of the key file.
        path: PathBuf,
    },
    /// The file is not TOML, or has an unknown or a missing key.
    #[error("{}: {reason}", path.display())]
    Toml {
        /// Path of the key file.
        path: PathBuf,
        /// Problem and position.
        reason: String,
    },
    /// A value is invalid.
    #[error("{}: `{key}` {problem}", path.display())]
    Value {
        /// Path of the key file.
        path: PathBuf,
        /// Name of the key.
        key: &'static str,
        /// Problem and remedy.
        problem: &'static str,
    },
}

/// Checked contents of the key file.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// HoA, key and servers of this node.
    pub(crate) identity: Identity,
    /// NICs for the node to use; empty for all.
    pub(crate) interfaces: Vec<String>,
    /// Routers of networks that the node may visit.
    pub(crate) routers: Vec<Ipv6Addr>,
    /// Whether the node adds a neutral address to those of a NIC.
    pub(crate) neutral: bool,
    /// Lifetime of the mapping, for updates.
    pub(crate) lifetime: Duration,
    /// Duration of forwarding that the node requests from the source of a migration.
    pub(crate) forward: Duration,
    /// Path of the state that survives restarts.
    pub(crate) state: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    hoa: Ipv6Addr,
    generation: u32,
    key: Hidden,
    home: String,
    servers: Vec<SocketAddrV6>,
    #[serde(default)]
    interfaces: Vec<String>,
    #[serde(default)]
    routers: Vec<Ipv6Addr>,
    #[serde(default = "yes")]
    neutral: bool,
    #[serde(default = "lifetime_s")]
    lifetime_s: u64,
    #[serde(default = "forward_s")]
    forward_s: u64,
    #[serde(default = "state")]
    state: PathBuf,
}

/// Digits of the key; `Debug` hides them.
#[derive(Deserialize)]
struct Hidden(String);

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hidden(..)")
    }
}

fn yes() -> bool {
    true
}

fn lifetime_s() -> u64 {
    600
}

fn forward_s() -> u64 {
    30
}

fn state() -> PathBuf {
    PathBuf::from("/var/lib/migkick/node.json")
}

impl Config {
    /// Reads and checks the file.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let error = |source| ConfigError::Read {
            path: path.to_owned(),
            source,
        };
        let text = std::fs::read_to_string(path).map_err(error)?;
        let mode = std::fs::metadata(path).map_err(error)?.permissions().mode();
        if mode & 0o077 != 0 {
            return Err(ConfigError::Readable {
                path: path.to_owned(),
            });
        }
        Self::parse(path, &text)
    }

    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let value = |key, problem| ConfigError::Value {
            path: path.to_owned(),
            key,
            problem,
        };
        let file: File = toml::from_str(text).map_err(|error| ConfigError::Toml {
            path: path.to_owned(),
            reason: explain(text, &error),
        })?;
        if file.generation == 0 {
            return Err(value("generation", "begins with 1; enroll the node again"));
        }
        let key = parse_key(&file.key.0).ok_or_else(|| {
            value(
                "key",
                "must have 64 hexadecimal digits; copy the line that `roamcast ims enroll` prints",
            )
        })?;
        let home = parse_prefix(&file.home).ok_or_else(|| {
            value(
                "home",
                "must be a prefix of 1 to 127 bits without host bits, such as \"fd5e:6d61:74::/48\"",
            )
        })?;
        if !contains(home, file.hoa) {
            return Err(value(
                "hoa",
                "is not in the prefix `home`; correct one of the two",
            ));
        }
        if file.servers.is_empty() {
            return Err(value(
                "servers",
                "is empty; name at least one, as \"[2001:db8::1]:47413\"",
            ));
        }
        if file.servers.len() > MAX_SERVERS {
            return Err(value(
                "servers",
                "has more than 8 entries; leave the far ones out",
            ));
        }
        let mut servers = file.servers.clone();
        servers.sort();
        servers.dedup();
        if servers.len() != file.servers.len() {
            return Err(value("servers", "names a server twice; leave one out"));
        }
        let bad = |server: &SocketAddrV6| {
            let address = *server.ip();
            address.is_unspecified() || address.is_multicast() || server.port() == 0
        };
        if file.servers.iter().any(bad) {
            return Err(value(
                "servers",
                "has an address that cannot be sent to; correct it",
            ));
        }
        if file.servers.iter().any(|it| contains(home, *it.ip())) {
            return Err(value(
                "servers",
                "has an address in the prefix `home`, which is routed nowhere; name the server's own address",
            ));
        }
        if file
            .routers
            .iter()
            .any(|it| it.is_multicast() || it.is_unicast_link_local())
        {
            return Err(value(
                "routers",
                "must be global addresses, one for each network",
            ));
        }
        if !LIFETIME_S.contains(&file.lifetime_s) {
            return Err(value("lifetime_s", "must be from 30 to 86400"));
        }
        if !FORWARD_S.contains(&file.forward_s) {
            return Err(value("forward_s", "must be from 1 to 300"));
        }
        Ok(Self {
            identity: Identity {
                hoa: file.hoa,
                home,
                key,
                servers: file.servers,
            },
            interfaces: file.interfaces,
            routers: file.routers,
            neutral: file.neutral,
            lifetime: Duration::from_secs(file.lifetime_s),
            forward: Duration::from_secs(file.forward_s),
            state: file.state,
        })
    }
}

/// Returns problem and line number without the text of the line, which may contain the key.
fn explain(text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |span| span.start);
    let before = text.get(..start).unwrap_or_default();
    let line = before.matches('\n').count() + 1;
    let message = error.message().trim();
    let key = text.lines().nth(line - 1).and_then(|it| it.split_once('='));
    match key {
        Some((key, _)) => format!("line {line}, `{}`: {message}", key.trim()),
        None => format!("line {line}: {message}"),
    }
}

fn parse_key(text: &str) -> Option<Key> {
    if text.len() != 2 * KEY_BYTES || !text.bytes().all(|it| it.is_ascii_hexdigit()) {
        return None;
    }
    let mut key = [0; KEY_BYTES];
    for (byte, digits) in key.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(Key(key))
}

fn parse_prefix(text: &str) -> Option<(Ipv6Addr, u8)> {
    let (prefix, length) = text.split_once('/')?;
    let (prefix, length): (Ipv6Addr, u8) = (prefix.parse().ok()?, length.parse().ok()?);
    let host = u128::MAX.checked_shr(length.into())?;
    let usable = length > 0 && prefix.to_bits() & host == 0 && !prefix.is_multicast();
    usable.then_some((prefix, length))
}

/// Whether a prefix contains an address.
pub(super) fn contains((prefix, length): (Ipv6Addr, u8), address: Ipv6Addr) -> bool {
    let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
    (prefix.to_bits() ^ address.to_bits()) & !host == 0
}

#[cfg(test)]
mod tests;
