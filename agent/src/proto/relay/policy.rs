//! Who may ask for which multicast addresses, and have them sent where.
//!
//! Rules are permissions: what no rule allows is refused. They are read from `[[policy]]` of the
//! relay's configuration as they stand here.

use std::net::Ipv6Addr;

use serde::Deserialize;

use crate::glob::{Glob, any_matches};
use crate::value::Prefix;

/// Permission for some agents to ask for some addresses.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Patterns for the name in the agent's certificate.
    pub agents: Vec<Glob>,
    /// Prefixes of the multicast addresses.
    pub multicast_addresses: Vec<Prefix>,
    /// Prefixes that copies may be sent to; empty: the address that the agent has connected from.
    #[serde(default)]
    pub agent_addresses: Vec<Prefix>,
}

impl Rule {
    fn allows(&self, agent: &str, multicast_address: Ipv6Addr) -> bool {
        any_matches(&self.agents, agent)
            && any_contains(&self.multicast_addresses, multicast_address)
    }

    /// Without prefixes, nobody has said that a host has other addresses than the one that it shows to have.
    fn allows_destination(&self, agent_address: Ipv6Addr, from: Option<Ipv6Addr>) -> bool {
        from == Some(agent_address) || any_contains(&self.agent_addresses, agent_address)
    }
}

fn any_contains(prefixes: &[Prefix], address: Ipv6Addr) -> bool {
    prefixes.iter().any(|prefix| prefix.contains(address))
}

/// What the rules say about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allowed,
    /// No rule lets the agent have the multicast address.
    Refused,
    /// A rule does, but not at that agent address.
    RefusedDestination,
}

/// Judges a request of an agent that is connected from an address.
pub(super) fn judge(
    rules: &[Rule],
    agent: &str,
    multicast_address: Ipv6Addr,
    (agent_address, from): (Ipv6Addr, Option<Ipv6Addr>),
) -> Verdict {
    let mut applicable = rules
        .iter()
        .filter(|rule| rule.allows(agent, multicast_address))
        .peekable();
    if applicable.peek().is_none() {
        Verdict::Refused
    } else if applicable.any(|rule| rule.allows_destination(agent_address, from)) {
        Verdict::Allowed
    } else {
        Verdict::RefusedDestination
    }
}
