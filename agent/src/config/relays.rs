//! `[relay]` of the agent's configuration: where relays are found, and when they are asked.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::value::{self, Name, PeerAddress};
use super::{Conflict, Peer};

/// `[relay]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Relays {
    /// Whether relays are asked at all.
    pub enabled: bool,
    /// Relays by name and address.
    pub servers: Vec<Peer>,
    /// DNS name whose addresses are relays.
    pub dns: Option<PeerAddress>,
    /// Name in the certificates of those; none: the DNS name itself.
    pub name: Option<Name>,
    /// An address at which the nearest of several relays answers.
    pub anycast: Option<Peer>,
    /// Session description that names relays.
    pub sdp: Option<Sdp>,
    /// Migration control servers, which know relays.
    pub mcs: Vec<Peer>,
    /// Site of this host, whose relays they name first; empty for none.
    pub site: Site,
    /// How long an arriving VM's address may be without a native packet.
    #[serde(
        rename = "delay_ms",
        deserialize_with = "value::milliseconds::<1, 5_000, _>"
    )]
    pub delay: Duration,
    /// Shortest silence of a flow that counts as one.
    #[serde(
        rename = "silence_ms",
        deserialize_with = "value::milliseconds::<20, 60_000, _>"
    )]
    pub silence: Duration,
    /// How often flows are looked at.
    #[serde(
        rename = "watch_interval_ms",
        deserialize_with = "value::milliseconds::<5, 10_000, _>"
    )]
    pub watch_interval: Duration,
    /// How long copies are told apart at a change.
    #[serde(
        rename = "settle_ms",
        deserialize_with = "value::milliseconds::<10, 1_500, _>"
    )]
    pub settle: Duration,
    /// How long native must be whole before a relay is let go.
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
    /// Whether relays are asked, and there is a way to find one.
    pub fn is_used(&self) -> bool {
        let found = !self.servers.is_empty()
            || self.dns.is_some()
            || self.anycast.is_some()
            || self.sdp.is_some()
            || !self.mcs.is_empty();
        self.enabled && found
    }

    /// The first rule between several keys that is broken.
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

/// Name of a site, as migration control servers compare it: up to 64 printable characters.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Site(String);

impl Site {
    /// The name; empty for none.
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

/// Where a session description is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Sdp {
    /// In a file.
    File(PathBuf),
    /// At an `http://` URL.
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
