//! Rows of a migration control server's `roamcast status`.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use common::signal;
use serde::{Deserialize, Serialize};

use super::{age_ms, milliseconds};
use crate::proto::Timestamp;
use crate::proto::directory::Registration;

/// `roamcast status` of a migration control server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct McsStatus {
    /// Name of the server.
    pub mcs: String,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since its start.
    pub uptime_ms: u64,
    /// How long a registration lasts without another one.
    pub lease_ms: u64,
    /// Agents and relays.
    pub registrations: Vec<RegistrationRow>,
    /// Counters that are not zero.
    pub counters: BTreeMap<String, u64>,
}

/// What has registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// An agent.
    Agent,
    /// A relay.
    Relay,
}

/// One that has registered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistrationRow {
    /// Its name.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Where it is reached.
    pub address: Ipv6Addr,
    /// Its site; absent for none.
    pub site: Option<String>,
    /// What a relay serves, as `ff0e::/16`; none for all.
    pub serves: Vec<String>,
    /// Since it registered first.
    pub age_ms: u64,
    /// Until it is forgotten.
    pub lease_left_ms: u64,
}

impl RegistrationRow {
    /// The row of a registration.
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
