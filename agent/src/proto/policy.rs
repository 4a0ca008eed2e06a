//! Which domains may leave to where, and which may arrive from where.
//!
//! Rules are permissions: what no rule allows is refused. They are read from `[policy]` of the
//! configuration as they stand here.

use serde::Deserialize;

use crate::glob::{Glob, any_matches};

/// Who may move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// `[[policy.depart]]`: permissions to leave this host.
    #[serde(rename = "depart")]
    pub departures: Vec<Departure>,
    /// `[[policy.arrive]]`: permissions to come to this host.
    #[serde(rename = "arrive")]
    pub arrivals: Vec<Arrival>,
}

/// Permission to leave.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Departure {
    /// Patterns for the domain's name.
    pub domains: Vec<Glob>,
    /// Patterns for the name of the destination's agent.
    pub destinations: Vec<Glob>,
}

/// Permission to arrive.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arrival {
    /// Patterns for the name of the source's agent.
    pub sources: Vec<Glob>,
    /// Patterns for the domain's name.
    pub domains: Vec<Glob>,
}

impl Policy {
    /// The policy that allows every move between known agents.
    pub fn allow_all() -> Self {
        let any = || vec![Glob::any()];
        Self {
            departures: vec![Departure {
                domains: any(),
                destinations: any(),
            }],
            arrivals: vec![Arrival {
                sources: any(),
                domains: any(),
            }],
        }
    }

    /// Whether a domain may leave to a destination.
    pub fn allows_departure(&self, domain: &str, destination: &str) -> bool {
        self.departures.iter().any(|rule| {
            any_matches(&rule.domains, domain) && any_matches(&rule.destinations, destination)
        })
    }

    /// Whether a domain may arrive from a source.
    pub fn allows_arrival(&self, source: &str, domain: &str) -> bool {
        self.arrivals
            .iter()
            .any(|rule| any_matches(&rule.sources, source) && any_matches(&rule.domains, domain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_rule_allows_is_refused() {
        let glob = |text: &str| vec![Glob::try_from(text).unwrap()];
        let policy = Policy {
            departures: vec![Departure {
                domains: glob("tv-*"),
                destinations: glob("vms2"),
            }],
            arrivals: vec![],
        };
        assert!(policy.allows_departure("tv-1", "vms2"));
        assert!(!policy.allows_departure("tv-1", "vms3"));
        assert!(!policy.allows_departure("db", "vms2"));
        assert!(!policy.allows_arrival("vms2", "tv-1"));
    }
}
