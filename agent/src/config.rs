//! Configuration: one TOML file for each role, which the role reads once at its start.
//!
//! The examples in `dist/` document every key. The reader checks each value, so a configuration that
//! exists is usable. An error names the file, the line and the key. The reader refuses unknown
//! keys: otherwise a misspelt limit would silently be the default.

#[cfg(feature = "agent")]
mod agent;
#[cfg(feature = "ims")]
mod ims;
mod locate;
#[cfg(feature = "mcs")]
mod mcs;
#[cfg(feature = "relay")]
mod relay;
mod section;
mod value;

use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

#[cfg(feature = "agent")]
pub use agent::{Agent, Config, Destination, Handover, Libvirt, Limits, Mobility, Relays, Sdp};
#[cfg(feature = "ims")]
pub use ims::{
    DEFAULT_IMS_SOCKET, Ims, ImsConfig, ImsLimits, ImsMapping, home_conflict, server_conflict,
};
#[cfg(feature = "mcs")]
pub use mcs::{DEFAULT_MCS_SOCKET, McsConfig};
#[cfg(feature = "relay")]
pub use relay::{DEFAULT_RELAY_SOCKET, Relay, RelayConfig, RelayLimits};
pub(crate) use section::DEFAULT_CONTROL_SOCKET;
pub use section::{Log, LogFormat, Peer, Tls};

/// Largest configuration file that the reader accepts, bytes.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Former keys, and where their values stand now.
const MOVED: [(&str, &str); 1] = [(
    "limits.incoming",
    "arrivals_at_once, and arrivals_per_peer, in [policy]",
)];

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
