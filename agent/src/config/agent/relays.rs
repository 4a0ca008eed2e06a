//! `[relay]` of the agent's configuration: how the agent finds relays, and when it asks them.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::super::section::Site;
use super::super::{Conflict, Peer, value};
use crate::value::{Name, PeerAddress};

/// Sources of relays, and the timers that decide when the agent asks one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Relays {
    /// False: the agent asks no relay.
    pub enabled: bool,
    /// Relays by name and address.
    pub servers: Vec<Peer>,
    /// DNS name whose addresses are those of relays.
    pub dns: Option<PeerAddress>,
    /// Name in the certificates of the relays behind `dns`; `None`: the DNS name.
    pub name: Option<Name>,
    /// Anycast address of a group of relays.
    pub anycast: Option<Peer>,
    /// Session description that names relays.
    pub sdp: Option<Sdp>,
    /// Migration control servers, which name relays.
    pub mcs: Vec<Peer>,
    /// Site of this host; empty for none. Migration control servers name relays of this site first.
    pub site: Site,
    /// Longest time that an arriving VM's address may go without a native packet before the agent
    /// asks a relay.
    #[serde(
        rename = "delay_ms",
        deserialize_with = "value::milliseconds::<1, 5_000, _>"
    )]
    pub delay: Duration,
    /// Shortest pause of a flow that counts as silence.
    #[serde(
        rename = "silence_ms",
        deserialize_with = "value::milliseconds::<20, 60_000, _>"
    )]
    pub silence: Duration,
    /// Interval at which the agent checks the flows.
    #[serde(
        rename = "watch_interval_ms",
        deserialize_with = "value::milliseconds::<5, 10_000, _>"
    )]
    pub watch_interval: Duration,
    /// Time for which the kernel drops second copies around a change of path.
    #[serde(
        rename = "settle_ms",
        deserialize_with = "value::milliseconds::<10, 1_500, _>"
    )]
    pub settle: Duration,
    /// Time for which the native path must lose nothing before the agent leaves a relay.
    #[serde(
        rename = "hold_ms",
        deserialize_with = "value::milliseconds::<100, 600_000, _>"
    )]
    pub hold: Duration,
}

impl Default for Relays {
    fn default() -> Self {
        Self {
            enabled: true,
            servers: Vec::new(),
            dns: None,
            name: None,
            anycast: None,
            sdp: None,
            mcs: Vec::new(),
            site: Site::default(),
            delay: Duration::from_millis(20),
            silence: Duration::from_millis(200),
            watch_interval: Duration::from_millis(50),
            settle: Duration::from_millis(300),
            hold: Duration::from_millis(3000),
        }
    }
}

impl Relays {
    /// Returns true if relays are enabled and the configuration names a source of relays.
    pub fn is_used(&self) -> bool {
        let found = !self.servers.is_empty()
            || self.dns.is_some()
            || self.anycast.is_some()
            || self.sdp.is_some()
            || !self.mcs.is_empty();
        self.enabled && found
    }

    /// Returns the first violated rule between several keys.
    pub(super) fn conflict(&self, own: &Name) -> Option<Conflict> {
        let conflict = |path: &[&str], message| Some(Conflict::new(path, message));
        let mut servers = BTreeSet::new();
        for (i, server) in self.servers.iter().enumerate() {
            let path = ["relay", "servers", &i.to_string(), "name"];
            let name = &server.name;
            if !servers.insert((name, server.address.to_string())) {
                return conflict(&path, format!("Relay \"{name}\" is listed twice"));
            }
            if name == own {
                let message = format!(
                    "Relay \"{name}\" has this agent's own name; give it a certificate of its own"
                );
                return conflict(&path, message);
            }
        }
        for (i, server) in self.mcs.iter().enumerate() {
            let name = &server.name;
            if name == own || self.servers.iter().any(|relay| relay.name == *name) {
                let path = ["relay", "mcs", &i.to_string(), "name"];
                let message = format!(
                    "Migration control server \"{name}\" has the name of another host; give it a certificate of its own"
                );
                return conflict(&path, message);
            }
        }
        if let Some(dns) = &self.dns
            && dns.host.parse::<Ipv6Addr>().is_ok()
        {
            let message = format!("\"{dns}\" is an address; list it in relay.servers");
            return conflict(&["relay", "dns"], message);
        }
        if self.name.is_some() && self.dns.is_none() {
            let message = "The name belongs to relay.dns, which is not set".to_owned();
            return conflict(&["relay", "name"], message);
        }
        (self.watch_interval > self.silence)
            .then(|| {
                let message = format!(
                    "Flows looked at every {} ms cannot be found silent after relay.silence_ms = {}",
                    self.watch_interval.as_millis(),
                    self.silence.as_millis()
                );
                conflict(&["relay", "watch_interval_ms"], message)
            })
            .flatten()
    }
}

/// Place of a session description (SDP).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Sdp {
    /// A file on this host.
    File(PathBuf),
    /// An `http://` URL.
    Url(String),
}

impl TryFrom<String> for Sdp {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match text.split_once("://") {
            Some(("http", rest)) if !rest.is_empty() && text.is_ascii() => Ok(Self::Url(text)),
            Some(_) => Err(format!(
                "\"{text}\" cannot be read; name a file or an http:// URL"
            )),
            None if text.is_empty() => Err("An empty path names no file".to_owned()),
            None => Ok(Self::File(PathBuf::from(text))),
        }
    }
}
