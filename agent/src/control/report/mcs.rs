//! Rows of a migration control server: `roamcast status`.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use common::signal;
use serde::{Deserialize, Serialize};

use super::{age_ms, milliseconds};
use crate::proto::Timestamp;
use crate::proto::directory::Registration;

/// Answer of a migration control server to `roamcast status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct McsStatus {
    /// Name of the server, as in its certificate.
    pub mcs: String,
    /// Version of the server's program.
    pub version: String,
    /// Process identifier of the server.
    pub pid: u32,
    /// Time since the server started.
    pub uptime_ms: u64,
    /// Lifetime of a registration that is not renewed.
    pub lease_ms: u64,
    /// Registered agents and relays.
    pub registrations: Vec<RegistrationRow>,
    /// Counters above 0, by name.
    pub counters: BTreeMap<String, u64>,
}

/// Kind of a registered program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// A host's agent, which searches for relays.
    Agent,
    /// A relay, which agents may find.
    Relay,
}

/// A registered agent or relay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistrationRow {
    /// Name in the certificate of the agent or relay.
    pub name: String,
    /// Agent or relay.
    pub role: Role,
    /// Address at which others reach the agent or relay.
    pub address: Ipv6Addr,
    /// Site; absent if the agent or relay names none.
    pub site: Option<String>,
    /// Multicast prefixes that a relay serves (`ff0e::/16`); empty: all.
    pub serves: Vec<String>,
    /// Time since the first registration.
    pub age_ms: u64,
    /// Time until the registration expires.
    pub lease_left_ms: u64,
}

impl RegistrationRow {
    /// Converts a registration.
    pub fn new(name: &str, known: &Registration, now: Timestamp) -> Self {
        Self {
            name: name.to_owned(),
            role: match known.role {
                signal::Role::Agent => Role::Agent,
                signal::Role::Relay => Role::Relay,
            },
            address: known.address,
            site: (!known.site.is_empty()).then(|| known.site.clone()),
            serves: known
                .serves
                .iter()
                .map(|range| format!("{}/{}", Ipv6Addr::from(*range.address), range.length))
                .collect(),
            age_ms: age_ms(now, known.since.0),
            lease_left_ms: milliseconds(known.until.since(now)),
        }
    }
}
