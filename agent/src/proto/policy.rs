//! Which domains may leave to where, and which may arrive from where.
//!
//! Rules are permissions: what no rule allows is refused. A name is matched by a glob, in which
//! `*` stands for any number of characters and `?` for one.

/// Who may move.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Permissions to leave this host.
    pub departures: Vec<Departure>,
    /// Permissions to come to this host.
    pub arrivals: Vec<Arrival>,
}

/// Permission to leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Departure {
    /// Globs of domain names.
    pub domains: Vec<String>,
    /// Globs of the names of destinations.
    pub destinations: Vec<String>,
}

/// Permission to arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Globs of the names of the agents that may send.
    pub peers: Vec<String>,
    /// Globs of domain names.
    pub domains: Vec<String>,
}

impl Policy {
    /// The policy that allows every move between known agents.
    pub fn allow_all() -> Self {
        let any = || vec!["*".to_owned()];
        Self {
            departures: vec![Departure {
                domains: any(),
                destinations: any(),
            }],
            arrivals: vec![Arrival {
                peers: any(),
                domains: any(),
            }],
        }
    }

    /// Whether a domain may leave to a destination.
    pub fn allows_departure(&self, domain: &str, destination: &str) -> bool {
        self.departures
            .iter()
            .any(|rule| any(&rule.domains, domain) && any(&rule.destinations, destination))
    }

    /// Whether a domain may arrive from a peer.
    pub fn allows_arrival(&self, peer: &str, domain: &str) -> bool {
        self.arrivals
            .iter()
            .any(|rule| any(&rule.peers, peer) && any(&rule.domains, domain))
    }
}

fn any(globs: &[String], name: &str) -> bool {
    globs.iter().any(|glob| matches(glob, name))
}

/// Whether a name matches a glob; in time linear in the product of their lengths.
pub fn matches(glob: &str, name: &str) -> bool {
    let (mut glob, mut name) = (glob.chars(), name.chars());
    // Where to go on after the last `*`: the glob behind it, and the name one character further.
    let mut retry = None;
    loop {
        let name_before = name.clone();
        match (glob.next(), name.next()) {
            (Some('*'), _) => {
                name = name_before;
                retry = Some((glob.clone(), name.clone()));
            }
            (None, None) => return true,
            (Some('?'), Some(_)) => {}
            (Some(a), Some(b)) if a == b => {}
            _ => {
                let Some((after_star, mut rest)) = retry else {
                    return false;
                };
                if rest.next().is_none() {
                    return false;
                }
                glob = after_star.clone();
                name = rest.clone();
                retry = Some((after_star, rest));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn glob_matches_as_a_shell_would() {
        for (glob, name) in [
            ("viewer", "viewer"),
            ("*", ""),
            ("*", "viewer"),
            ("view*", "viewer"),
            ("*er", "viewer"),
            ("v*w*r", "viewer"),
            ("v?ewer", "viewer"),
            ("*ab", "aab"),
            ("a**b", "ab"),
        ] {
            assert!(matches(glob, name), "{glob} should match {name:?}");
        }
        for (glob, name) in [
            ("viewer", "viewer2"),
            ("", "v"),
            ("?", ""),
            ("view*x", "viewer"),
            ("*ab", "aba"),
        ] {
            assert!(!matches(glob, name), "{glob} should not match {name:?}");
        }
    }

    #[test]
    fn what_no_rule_allows_is_refused() {
        let policy = Policy {
            departures: vec![Departure {
                domains: vec!["tv-*".to_owned()],
                destinations: vec!["vms2".to_owned()],
            }],
            arrivals: vec![],
        };
        assert!(policy.allows_departure("tv-1", "vms2"));
        assert!(!policy.allows_departure("tv-1", "vms3"));
        assert!(!policy.allows_departure("db", "vms2"));
        assert!(!policy.allows_arrival("vms2", "tv-1"));
    }

    proptest! {
        #[test]
        fn any_glob_and_name_end(glob in "[ab*?]{0,12}", name in "[ab]{0,24}") {
            let _ = matches(&glob, &name);
        }

        #[test]
        fn star_around_matches_whatever_holds_the_name(a in "[a-z]{0,8}", b in "[a-z]{1,8}", c in "[a-z]{0,8}") {
            let glob = format!("*{b}*");
            let name = format!("{a}{b}{c}");
            prop_assert!(matches(&glob, &name));
        }
    }
}
