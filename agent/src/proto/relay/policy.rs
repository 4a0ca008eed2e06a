//! Permissions of agents: multicast addresses, and destinations of the copies.
//!
//! Rules are permissions: the relay refuses whatever no rule allows. The relay reads these types
//! directly from `[[policy]]` of its configuration.

use std::net::Ipv6Addr;

use serde::Deserialize;

use crate::glob::{Glob, any_matches};
use crate::value::Prefix;

/// Permission for some agents to request some addresses.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Patterns for the name in the agent's certificate.
    pub agents: Vec<Glob>,
    /// Prefixes of allowed multicast addresses.
    pub multicast_addresses: Vec<Prefix>,
    /// Prefixes of allowed destinations of the copies. If empty, only the address that the agent
    /// connects from is allowed.
    #[serde(default)]
    pub agent_addresses: Vec<Prefix>,
}

impl Rule {
    fn allows(&self, agent: &str, multicast_address: Ipv6Addr) -> bool {
        any_matches(&self.agents, agent)
            && any_contains(&self.multicast_addresses, multicast_address)
    }

    /// Without prefixes, only the address that an agent connects from is proven to be the agent's.
    fn allows_destination(&self, agent_address: Ipv6Addr, from: Option<Ipv6Addr>) -> bool {
        from == Some(agent_address) || any_contains(&self.agent_addresses, agent_address)
    }
}

fn any_contains(prefixes: &[Prefix], address: Ipv6Addr) -> bool {
    prefixes.iter().any(|prefix| prefix.contains(address))
}

/// Result of the rules for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Allowed,
    /// No rule allows the agent to request the multicast address.
    Refused,
    /// A rule allows the multicast address, but no rule allows the destination.
    RefusedDestination,
}

/// Judges a request from an agent; `from` is the address that the agent connects from.
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
