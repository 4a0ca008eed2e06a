//! Checks of a request: fields, policy, limits.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use common::group;
use common::maps::{Address, FilterMode, NO_BRIDGE, StreamKey};
use common::signal::RelayRequest;

use super::policy::{Verdict, judge};
use super::{Filter, Refusal, RelayServer};

/// A request with valid fields.
pub(super) struct Wanted {
    pub(super) multicast_address: Address,
    pub(super) filter: Filter,
    pub(super) agent_address: Address,
    /// Flows that the agent knows.
    pub(super) named: BTreeSet<StreamKey>,
}

impl RelayServer {
    /// Checks the fields and the policy.
    pub(super) fn check(&self, agent: &str, request: &RelayRequest) -> Result<Wanted, Refusal> {
        let relay = || self.config.name.clone();
        let multicast_address = *request.multicast_address;
        let address = Ipv6Addr::from(multicast_address);
        if !group::is_routable(&multicast_address) {
            return Err(Refusal::NotRoutable { address });
        }
        let mode = FilterMode::from_u8(request.filter_mode).ok_or(Refusal::BadField {
            field: "filter mode",
        })?;
        let limit = self.config.limits.sources;
        if request.sources.len() > limit {
            return Err(Refusal::TooManySources {
                relay: relay(),
                sources: request.sources.len(),
                limit,
            });
        }
        let filter = Filter {
            mode,
            sources: request
                .sources
                .iter()
                .map(|it| Ipv6Addr::from(**it))
                .collect(),
        };
        if filter.sources.iter().any(|source| !is_unicast(*source)) {
            return Err(Refusal::BadField { field: "sources" });
        }
        match mode {
            FilterMode::Include if filter.sources.is_empty() => {
                return Err(Refusal::NoSources { address });
            }
            FilterMode::Exclude if group::is_source_specific(&multicast_address) => {
                return Err(Refusal::SourceSpecific { address });
            }
            _ => {}
        }
        let agent_address = Ipv6Addr::from(*request.agent_address);
        if !is_unicast(agent_address)
            || agent_address.is_loopback()
            || agent_address.is_unicast_link_local()
            || agent_address == self.config.address
        {
            return Err(Refusal::BadField {
                field: "address of the agent",
            });
        }
        let from = self.address_of(agent);
        match judge(&self.config.policy, agent, address, (agent_address, from)) {
            Verdict::Allowed => {}
            Verdict::Refused => {
                return Err(Refusal::Policy {
                    relay: relay(),
                    agent: agent.to_owned(),
                    address,
                });
            }
            Verdict::RefusedDestination => {
                return Err(Refusal::Destination {
                    relay: relay(),
                    agent: agent.to_owned(),
                    address: agent_address,
                });
            }
        }
        let named = request
            .flows
            .iter()
            .take(self.config.limits.flows_per_session)
            .map(|flow| StreamKey {
                multicast_address,
                source: *flow.source,
                source_port: flow.source_port,
                destination_port: flow.destination_port,
                vlan: 0,
                bridge: NO_BRIDGE,
            })
            // A flow without ports is not UDP, so no relay can carry the flow.
            .filter(|stream| stream.source_port != 0 && stream.destination_port != 0)
            .filter(|stream| is_unicast(stream.source.into()) && filter.accepts(&stream.source))
            .collect();
        Ok(Wanted {
            multicast_address,
            filter,
            agent_address: agent_address.octets(),
            named,
        })
    }

    /// Returns the address that a connected agent dialed from; `None` if unknown.
    fn address_of(&self, agent: &str) -> Option<Ipv6Addr> {
        self.connected.get(agent).copied().flatten()
    }

    /// Ensures that the relay sends to an agent address for one agent only. An agent that connects from
    /// the address displaces an agent that merely the policy allows to use the address.
    pub(super) fn make_way(&mut self, agent: &str, address: Address) -> Result<(), Refusal> {
        let agent_address = Ipv6Addr::from(address);
        let is_there = |name: &str| self.address_of(name) == Some(agent_address);
        let others: Vec<(u64, &str)> = self
            .neighbours
            .get(&address)
            .into_iter()
            .flatten()
            .filter_map(|number| Some((*number, self.sessions.get(number)?.owner.as_ref()?)))
            .map(|(number, owner)| (number, owner.agent.as_str()))
            .filter(|(_, other)| *other != agent)
            .collect();
        let relay = self.config.name.clone();
        if !others.is_empty() && (!is_there(agent) || others.iter().any(|it| is_there(it.1))) {
            let address = agent_address;
            return Err(Refusal::OtherAgent { relay, address });
        }
        let displaced: Vec<u64> = others.iter().map(|(number, _)| *number).collect();
        for number in displaced {
            let refusal = Refusal::Displaced {
                relay: relay.clone(),
                address: agent_address,
            };
            self.end(number, &refusal);
        }
        Ok(())
    }

    /// Checks the limits for one more session.
    pub(super) fn check_room(&self, agent: &str, wanted: &Wanted) -> Result<(), Refusal> {
        let relay = || self.config.name.clone();
        let limits = &self.config.limits;
        if self.sessions.len() >= limits.sessions {
            return Err(Refusal::TooManySessions {
                relay: relay(),
                limit: limits.sessions,
            });
        }
        if self.of_agent(agent).count() >= limits.sessions_per_agent {
            return Err(Refusal::TooManyOfAgent {
                relay: relay(),
                agent: agent.to_owned(),
                limit: limits.sessions_per_agent,
            });
        }
        // The rate of flows that have not started is unknown; a later request is refused instead.
        let more = self.rate_of(&wanted.multicast_address, &wanted.filter);
        let used_above = |limit: u64, agent: Option<&str>| {
            // The sum is slow to compute and useless without a limit.
            let used = (limit < u64::MAX).then(|| self.bits_per_second(agent))?;
            (used >= limit || used.saturating_add(more) > limit).then_some(used)
        };
        let limit = limits.bits_per_second;
        if let Some(used) = used_above(limit, None) {
            return Err(Refusal::Bandwidth {
                relay: relay(),
                used,
                limit,
            });
        }
        let limit = limits.bits_per_second_per_agent;
        if let Some(used) = used_above(limit, Some(agent)) {
            return Err(Refusal::BandwidthOfAgent {
                relay: relay(),
                agent: agent.to_owned(),
                used,
                limit,
            });
        }
        Ok(())
    }
}

fn is_unicast(address: Ipv6Addr) -> bool {
    !address.is_multicast() && !address.is_unspecified()
}
