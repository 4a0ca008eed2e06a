//! Admission of peers: identity by certificate, backoff of failing addresses, known addresses, and
//! the rate limit of log lines.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::PeersConfig;
use crate::glob::any_matches;
use crate::role::Role;

/// Interval between log lines about the same peer and reason.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Consecutive failures of an address before it must wait.
const FREE_FAILURES: u32 = 8;
/// Longest backoff of an address.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// Idle time after which a failing address is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// Capacity of each table: strangers cannot make a table grow further.
const MAX_ENTRIES: usize = 1024;

/// Failures, known addresses and recent log lines.
#[derive(Debug, Default)]
pub(super) struct Admission {
    sources: HashMap<IpAddr, Source>,
    /// Addresses from which peers have authenticated, with the time of the latest connection.
    known: HashMap<IpAddr, Instant>,
    logged: HashMap<String, Instant>,
}

#[derive(Debug)]
struct Source {
    failures: u32,
    wait_until: Instant,
    last: Instant,
}

impl Admission {
    /// Whether the address is not in backoff.
    pub(super) fn may_try(&self, source: IpAddr, now: Instant) -> bool {
        self.sources
            .get(&source)
            .is_none_or(|source| source.wait_until <= now)
    }

    /// Records that an address failed to authenticate or misbehaved.
    pub(super) fn failed(&mut self, source: IpAddr, now: Instant) {
        if self.sources.len() >= MAX_ENTRIES {
            self.sources
                .retain(|_, source| now.duration_since(source.last) < FORGET_AFTER);
        }
        if self.sources.len() >= MAX_ENTRIES && !self.sources.contains_key(&source) {
            return;
        }
        let entry = self.sources.entry(source).or_insert(Source {
            failures: 0,
            wait_until: now,
            last: now,
        });
        entry.failures = entry.failures.saturating_add(1);
        entry.last = now;
        if let Some(excess) = entry.failures.checked_sub(FREE_FAILURES) {
            entry.wait_until = now + Duration::from_secs(1 << excess.min(6)).min(MAX_WAIT);
        }
    }

    /// Clears the failures of an address that authenticated, and records the address as known.
    pub(super) fn succeeded(&mut self, source: IpAddr, now: Instant) {
        self.sources.remove(&source);
        if self.known.len() >= MAX_ENTRIES
            && !self.known.contains_key(&source)
            && let Some(oldest) = self.known.iter().min_by_key(|(_, at)| **at)
        {
            let oldest = *oldest.0;
            self.known.remove(&oldest);
        }
        self.known.insert(source, now);
    }

    /// Whether a peer has authenticated from this address.
    pub(super) fn is_known(&self, source: IpAddr) -> bool {
        self.known.contains_key(&source)
    }

    /// Returns true, and records the time, if `what` was not logged within [`LOG_INTERVAL`].
    pub(super) fn log_now(&mut self, what: &str) -> bool {
        let now = Instant::now();
        if self.logged.len() >= MAX_ENTRIES {
            self.logged
                .retain(|_, at| now.duration_since(*at) < LOG_INTERVAL);
        }
        let full = self.logged.len() >= MAX_ENTRIES;
        match self.logged.get_mut(what) {
            Some(at) if now.duration_since(*at) < LOG_INTERVAL => false,
            Some(at) => {
                *at = now;
                true
            }
            None if full => false,
            None => {
                self.logged.insert(what.to_owned(), now);
                true
            }
        }
    }
}

/// Result of [`identify`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    /// Admitted, under this name.
    Peer(String),
    /// The certificate contains this agent's own name.
    Own,
    /// The role is not admitted here, or differs from the configured role of this name.
    Misplaced(String),
    /// Not admitted; the first name of the certificate.
    Stranger(String),
}

/// Identifies the holder of a certificate with these names and this role, on a host of role `own`.
/// A configured name takes precedence over a name that only matches an `admit` pattern.
pub(super) fn identify(names: &[String], role: Role, own: Role, config: &PeersConfig) -> Identity {
    let first = || names.first().cloned().unwrap_or_default();
    if !own.admitted().contains(&role) {
        return Identity::Misplaced(first());
    }
    if names.contains(&config.name) {
        return Identity::Own;
    }
    let elsewhere = |name: &&String| {
        let endpoint = config.peers.get(*name);
        endpoint.is_some_and(|endpoint| endpoint.role != role)
    };
    if let Some(name) = names.iter().find(elsewhere) {
        return Identity::Misplaced(name.clone());
    }
    let configured = |name: &&String| config.peers.contains_key(*name);
    let admitted = |name: &&String| any_matches(&config.admit, name);
    match names
        .iter()
        .find(configured)
        .or_else(|| names.iter().find(admitted))
    {
        Some(name) => Identity::Peer(name.clone()),
        None => Identity::Stranger(first()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::peers::Endpoint;

    fn config() -> PeersConfig {
        let endpoint = |role| Endpoint {
            role,
            address: "[::1]:1".to_owned(),
        };
        PeersConfig {
            name: "vms1".to_owned(),
            peers: [
                ("vms2".to_owned(), endpoint(Role::Agent)),
                ("mcs1".to_owned(), endpoint(Role::Mcs)),
            ]
            .into(),
            admit: vec!["edge-*.example".try_into().unwrap()],
            ..PeersConfig::default()
        }
    }

    /// The identity that an agent gives a peer agent with these names.
    fn agent(names: &[&str]) -> Identity {
        of_role(Role::Agent, names)
    }

    fn of_role(role: Role, names: &[&str]) -> Identity {
        let names: Vec<_> = names.iter().copied().map(str::to_owned).collect();
        identify(&names, role, Role::Agent, &config())
    }

    #[test]
    fn role_that_has_nothing_to_do_here_is_misplaced_whatever_its_names() {
        for role in [Role::Relay, Role::Mcs] {
            for name in ["vms2", "vms1", "mcs1", "edge-7.example", "other"] {
                let misplaced = Identity::Misplaced(name.to_owned());
                assert_eq!(of_role(role, &[name]), misplaced);
            }
            let nobody = Identity::Misplaced(String::new());
            assert_eq!(of_role(role, &[]), nobody);
        }
    }

    #[test]
    fn agent_under_the_name_of_a_configured_server_is_misplaced() {
        let misplaced = Identity::Misplaced("mcs1".to_owned());
        assert_eq!(agent(&["mcs1"]), misplaced);
        assert_eq!(agent(&["vms2", "mcs1"]), misplaced);
    }

    #[test]
    fn configured_name_goes_before_admitted_one() {
        assert_eq!(
            agent(&["edge-7.example", "vms2"]),
            Identity::Peer("vms2".to_owned())
        );
        assert_eq!(
            agent(&["edge-7.example"]),
            Identity::Peer("edge-7.example".to_owned())
        );
    }

    #[test]
    fn own_name_and_strangers_are_told_apart() {
        assert_eq!(agent(&["vms2", "vms1"]), Identity::Own);
        assert_eq!(
            agent(&["edge-7.example.org"]),
            Identity::Stranger("edge-7.example.org".to_owned())
        );
        assert_eq!(agent(&[]), Identity::Stranger(String::new()));
    }

    #[test]
    fn source_that_fails_on_and_on_has_to_wait_longer_and_longer() {
        let mut admission = Admission::default();
        let source = IpAddr::from([192, 0, 2, 1]);
        let now = Instant::now();
        for _ in 1..FREE_FAILURES {
            admission.failed(source, now);
        }
        assert!(admission.may_try(source, now));
        admission.failed(source, now);
        assert!(!admission.may_try(source, now));
        assert!(admission.may_try(source, now + Duration::from_secs(1)));
        for _ in 0..100 {
            admission.failed(source, now);
        }
        assert!(!admission.may_try(source, now + MAX_WAIT - Duration::from_secs(1)));
        assert!(admission.may_try(source, now + MAX_WAIT));
        admission.succeeded(source, now);
        assert!(admission.may_try(source, now));
    }

    #[test]
    fn address_that_has_authenticated_is_known_until_many_others_have() {
        let mut admission = Admission::default();
        let now = Instant::now();
        let address = |number: u32| IpAddr::from(number.to_be_bytes());
        admission.failed(address(0), now);
        assert!(!admission.is_known(address(0)));
        for number in 0..MAX_ENTRIES as u32 {
            admission.succeeded(address(number), now + Duration::from_secs(number.into()));
        }
        assert!(admission.is_known(address(0)) && admission.is_known(address(1)));
        let late = now + Duration::from_secs(1 << 20);
        admission.succeeded(address(0), late);
        admission.succeeded(address(1 << 20), late);
        assert!(admission.is_known(address(0)) && !admission.is_known(address(1)));
    }

    #[test]
    fn tables_do_not_grow_without_bound() {
        let mut admission = Admission::default();
        let now = Instant::now();
        for i in 0..5000_u32 {
            admission.failed(IpAddr::from(i.to_be_bytes()), now);
            admission.log_now(&i.to_string());
        }
        assert!(admission.sources.len() <= MAX_ENTRIES);
        assert!(admission.logged.len() <= MAX_ENTRIES);
    }

    #[test]
    fn same_refusal_is_logged_once() {
        let mut admission = Admission::default();
        assert!(admission.log_now("a"));
        assert!(!admission.log_now("a"));
        assert!(admission.log_now("b"));
    }
}
