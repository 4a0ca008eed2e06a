//! Permissions for migrations: domains, hosts, concurrency and rate.
//!
//! Rules are permissions: the agent refuses whatever no rule allows, so nothing migrates without a
//! rule. The agent reads these types directly from `[policy]` of its configuration.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU32};
use std::time::Duration;

use serde::Deserialize;

use crate::glob::{Glob, any_matches};

/// Section `[policy]` of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    /// `[[policy.depart]]`: permissions to leave this host.
    #[serde(rename = "depart")]
    pub departures: Vec<Departure>,
    /// `[[policy.arrive]]`: permissions to arrive at this host.
    #[serde(rename = "arrive")]
    pub arrivals: Vec<Arrival>,
    /// Limit of concurrently departing domains.
    pub departures_at_once: NonZeroU16,
    /// Limit of concurrently departing domains per destination host; `None` means half of the total.
    pub departures_per_peer: Option<NonZeroU16>,
    /// Limit of concurrently arriving domains.
    pub arrivals_at_once: NonZeroU16,
    /// Limit of concurrently arriving domains per source host; `None` means half of the total.
    pub arrivals_per_peer: Option<NonZeroU16>,
    /// Limit of one peer's requests that wait for a place.
    pub waiting_per_peer: u16,
    /// Migrations that one peer may request per minute; also the burst.
    pub requests_per_minute: NonZeroU32,
    /// Pause after a migration before the VM may request another, seconds.
    pub vm_pause_s: u32,
}

impl Default for Policy {
    fn default() -> Self {
        let sixteen = NonZeroU16::MIN.saturating_add(15);
        Self {
            departures: Vec::new(),
            arrivals: Vec::new(),
            departures_at_once: sixteen,
            departures_per_peer: None,
            arrivals_at_once: sixteen,
            arrivals_per_peer: None,
            waiting_per_peer: 32,
            requests_per_minute: NonZeroU32::MIN.saturating_add(119),
            vm_pause_s: 60,
        }
    }
}

/// Requester of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Asker {
    /// The operator, with `roamcast migrate` on this host.
    Operator,
    /// The VM itself, with `migkick`.
    Vm,
    /// A user of libvirt, as reported by the destination host's hook.
    Hook,
}

impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Operator => "operator",
            Self::Vm => "vm",
            Self::Hook => "hook",
        })
    }
}

/// Permission to leave.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Departure {
    /// Patterns for the domain's name.
    pub domains: Vec<Glob>,
    /// Patterns for the name of the destination host's agent.
    pub destinations: Vec<Glob>,
    /// Allowed requesters.
    #[serde(default = "operator_only")]
    pub by: Vec<Asker>,
}

fn operator_only() -> Vec<Asker> {
    vec![Asker::Operator]
}

/// Permission to arrive.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arrival {
    /// Patterns for the name of the source host's agent.
    pub sources: Vec<Glob>,
    /// Patterns for the domain's name.
    pub domains: Vec<Glob>,
}

/// Limits of concurrent migrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) of_all: usize,
    pub(super) of_peer: usize,
}

impl Share {
    fn new(of_all: NonZeroU16, of_peer: Option<NonZeroU16>) -> Self {
        let of_all = usize::from(of_all.get());
        let half = of_all.div_ceil(2);
        Self {
            of_all,
            of_peer: of_peer.map_or(half, |number| usize::from(number.get())),
        }
    }
}

impl Policy {
    /// Returns true if a rule lets a domain leave for a destination host at this requester's demand.
    pub fn allows_departure(&self, domain: &str, destination: &str, by: Asker) -> bool {
        self.departures.iter().any(|rule| {
            rule.by.contains(&by)
                && any_matches(&rule.domains, domain)
                && any_matches(&rule.destinations, destination)
        })
    }

    /// Returns true if a rule lets a domain arrive from a source host.
    pub fn allows_arrival(&self, source: &str, domain: &str) -> bool {
        self.arrivals
            .iter()
            .any(|rule| any_matches(&rule.sources, source) && any_matches(&rule.domains, domain))
    }

    /// Returns the limits of departing domains.
    pub(super) fn departing(&self) -> Share {
        Share::new(self.departures_at_once, self.departures_per_peer)
    }

    /// Returns the limits of arriving domains.
    pub(super) fn arriving(&self) -> Share {
        Share::new(self.arrivals_at_once, self.arrivals_per_peer)
    }

    /// Returns the pause after a migration before the VM may request another.
    pub(super) fn vm_pause(&self) -> Duration {
        Duration::from_secs(u64::from(self.vm_pause_s))
    }

    /// Returns the key that allows one peer more than all peers together; `None` if no key does.
    pub(crate) fn conflict(&self) -> Option<&'static str> {
        let exceeds =
            |of_peer: Option<NonZeroU16>, of_all| of_peer.is_some_and(|of_peer| of_peer > of_all);
        if exceeds(self.departures_per_peer, self.departures_at_once) {
            Some("departures_per_peer")
        } else if exceeds(self.arrivals_per_peer, self.arrivals_at_once) {
            Some("arrivals_per_peer")
        } else {
            None
        }
    }
}

#[cfg(any(test, fuzzing))]
impl Policy {
    /// Returns a policy that allows every migration between known agents, without a pause.
    pub(super) fn allow_all() -> Self {
        let any = || vec![Glob::any()];
        Self {
            departures: vec![Departure {
                domains: any(),
                destinations: any(),
                by: vec![Asker::Operator, Asker::Vm, Asker::Hook],
            }],
            arrivals: vec![Arrival {
                sources: any(),
                domains: any(),
            }],
            vm_pause_s: 0,
            ..Self::default()
        }
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
                by: vec![Asker::Vm],
            }],
            ..Policy::default()
        };
        assert!(policy.allows_departure("tv-1", "vms2", Asker::Vm));
        assert!(!policy.allows_departure("tv-1", "vms3", Asker::Vm));
        assert!(!policy.allows_departure("db", "vms2", Asker::Vm));
        for by in [Asker::Operator, Asker::Hook] {
            assert!(!policy.allows_departure("tv-1", "vms2", by));
        }
        assert!(!policy.allows_arrival("vms2", "tv-1"));
    }

    #[test]
    fn nothing_moves_by_default() {
        let policy = Policy::default();
        for by in [Asker::Operator, Asker::Vm, Asker::Hook] {
            assert!(!policy.allows_departure("tv-1", "vms2", by));
        }
        assert!(!policy.allows_arrival("vms2", "tv-1"));
        assert_eq!(policy.vm_pause(), Duration::from_secs(60));
    }

    #[test]
    fn peer_has_half_of_the_places_unless_it_is_given_more_or_less() {
        let number = |number| NonZeroU16::new(number).unwrap();
        let share = |of_all, of_peer| Share::new(number(of_all), of_peer).of_peer;
        assert_eq!((share(16, None), share(1, None)), (8, 1));
        assert_eq!(share(16, Some(number(12))), 12);
    }
}
