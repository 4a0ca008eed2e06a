//! Sections that the files of several roles have.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::PathBuf;

use common::signal::PORT;
use serde::Deserialize;

use super::value;
use crate::glob::Glob;
use crate::net::tls::TlsFiles;
use crate::value::{Name, PeerAddress};

/// Most entries of one map: 16 Mi, a bound against typing errors.
pub(super) const MAX_MAP_ENTRIES: u64 = 1 << 24;
/// Path of the operator's socket if the configuration sets none.
pub(crate) const DEFAULT_CONTROL_SOCKET: &str = "/run/roamcast/agent.sock";

pub(super) fn default_listen() -> SocketAddrV6 {
    SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, PORT, 0, 0)
}

/// `[tls]`: certificates of the signalling.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Tls {
    /// CA certificate (PEM).
    pub ca: PathBuf,
    /// This host's certificate (PEM), for servers and clients.
    pub cert: PathBuf,
    /// Private key of `cert` (PEM).
    pub key: PathBuf,
    /// Certificate revocation list of the CA (PEM); the file may be missing.
    pub crl: PathBuf,
    /// Names in certificates that may connect in addition to `[[peers]]`.
    pub admit: Vec<Glob>,
}

impl Default for Tls {
    fn default() -> Self {
        let files = TlsFiles::default();
        Self {
            ca: files.ca,
            cert: files.certificate,
            key: files.key,
            crl: files.crl,
            admit: Vec::new(),
        }
    }
}

/// An agent of another host, from `[[peers]]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Name of the agent in its certificate, and argument of `migkick go`.
    pub name: Name,
    /// Address at which the agent listens.
    pub address: PeerAddress,
    /// libvirt URI of that host, for this host's libvirtd; `None`: derived from `address`.
    #[serde(default, deserialize_with = "value::optional_uri")]
    pub connect_uri: Option<String>,
    /// URI to which this host's QEMU sends memory; `None`: derived from `address`.
    #[serde(default, deserialize_with = "value::optional_uri")]
    pub migrate_uri: Option<String>,
}

impl Peer {
    /// Returns the libvirt URI by which this host's libvirtd reaches that host.
    pub fn connect_uri(&self) -> String {
        self.connect_uri
            .clone()
            .unwrap_or_else(|| format!("qemu+tls://{}/system", self.address.bracketed_host()))
    }

    /// Returns the URI to which this host's QEMU sends memory.
    pub fn migrate_uri(&self) -> String {
        self.migrate_uri
            .clone()
            .unwrap_or_else(|| format!("tcp://{}", self.address.bracketed_host()))
    }
}

/// Name of a site, up to 64 printable characters. Migration control servers compare names of sites.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Site(String);

impl Site {
    /// Returns the name; empty for no site.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Site {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        if text.len() > 64 || text.chars().any(char::is_control) {
            return Err(format!(
                "{text:?} is no name of a site; use up to 64 printable characters"
            ));
        }
        Ok(Self(text))
    }
}

/// Level and format of the log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// Filter of `tracing` (`info`, `warn,roamcast::proto=debug`).
    pub level: String,
    /// Format of the lines.
    pub format: LogFormat,
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Text,
        }
    }
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// Text for people and the journal.
    Text,
    /// One JSON object per line.
    Json,
}

impl From<&Tls> for TlsFiles {
    fn from(tls: &Tls) -> Self {
        Self {
            ca: tls.ca.clone(),
            certificate: tls.cert.clone(),
            key: tls.key.clone(),
            crl: tls.crl.clone(),
        }
    }
}
