//! Sessions: request, renewal, takeover, release, expiry.

use crate::proto::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use common::maps::{Address, ManagedKey, StreamKey};
use common::signal::{RelayRelease, RelayRequest};
use tracing::{info, warn};

use super::request::Wanted;
use super::stream::{Group, StreamState};
use super::{Filter, Owner, Refusal, RelayOutput, RelayServer, Session, Timer, managed_key};

impl RelayServer {
    pub(super) fn request(
        &mut self,
        agent: &str,
        transaction: u64,
        request: &RelayRequest,
    ) -> Result<(), Refusal> {
        let wanted = self.check(agent, request)?;
        self.make_way(agent, wanted.agent_address)?;
        let name = (agent.to_owned(), wanted.multicast_address);
        let number = match self.names.get(&name) {
            Some(number) => *number,
            None => match self.adopted_session(&wanted) {
                Some(number) => number,
                None => {
                    self.check_room(agent, &wanted)?;
                    self.open(&wanted)
                }
            },
        };
        self.names.insert(name, number);
        self.renew(number, agent, transaction, wanted);
        Ok(())
    }

    /// Returns the numbers of an agent's sessions.
    pub(super) fn of_agent(&self, agent: &str) -> impl Iterator<Item = u64> + '_ {
        self.names
            .range((agent.to_owned(), [0; 16])..=(agent.to_owned(), [0xff; 16]))
            .map(|(_, number)| *number)
    }

    /// Returns the session that an earlier relay had with the agent at this address.
    fn adopted_session(&self, wanted: &Wanted) -> Option<u64> {
        let group = self.groups.get(&wanted.multicast_address)?;
        group.sessions.iter().copied().find(|number| {
            self.sessions.get(number).is_some_and(|session| {
                session.owner.is_none() && session.agent_address == wanted.agent_address
            })
        })
    }

    /// Creates a session without owner and flows, and joins.
    fn open(&mut self, wanted: &Wanted) -> u64 {
        let number = self.next_session;
        self.next_session += 1;
        let session = Session {
            owner: None,
            multicast_address: wanted.multicast_address,
            filter: wanted.filter.clone(),
            agent_address: wanted.agent_address,
            since: self.now,
            lease_end: self.now,
            resolving: false,
            flows: BTreeMap::new(),
        };
        self.insert_session(number, session);
        number
    }

    /// Registers a session, and joins.
    pub(super) fn insert_session(&mut self, number: u64, session: Session) {
        let multicast_address = session.multicast_address;
        let agent_address = session.agent_address;
        let filter = session.filter.clone();
        self.sessions.insert(number, session);
        match self.groups.get_mut(&multicast_address) {
            Some(group) => {
                group.sessions.insert(number);
                self.rejoin(&multicast_address);
            }
            None => {
                let key = managed_key(&multicast_address);
                // The address is managed before the join, so the first packet raises an event.
                self.outputs.push_back(RelayOutput::Manage {
                    key,
                    since: self.now,
                });
                self.outputs
                    .push_back(RelayOutput::Join(filter.membership(key)));
                let mut group = Group::new(filter, self.now);
                group.sessions.insert(number);
                self.groups.insert(multicast_address, group);
                if self.timers.get(Timer::Measure).is_none() {
                    let due = self.now + self.config.measure_interval;
                    self.timers.set(Timer::Measure, due);
                }
            }
        }
        self.neighbours
            .entry(agent_address)
            .or_default()
            .insert(number);
    }

    /// Joins with the union of the filters of an address's sessions.
    fn rejoin(&mut self, multicast_address: &Address) {
        let Some(group) = self.groups.get_mut(multicast_address) else {
            return;
        };
        let sessions = &self.sessions;
        let filters = group
            .sessions
            .iter()
            .filter_map(|number| sessions.get(number))
            .map(|session| &session.filter);
        let merged = Filter::merge(filters);
        if merged != group.filter {
            group.filter = merged;
            let membership = group.filter.membership(managed_key(multicast_address));
            self.outputs.push_back(RelayOutput::Join(membership));
        }
    }

    /// Gives a session its owner, filter, flows and a new lease, and answers the agent.
    fn renew(&mut self, number: u64, agent: &str, transaction: u64, wanted: Wanted) {
        let Wanted {
            multicast_address,
            filter,
            agent_address,
            named,
        } = wanted;
        self.move_session(number, agent_address);
        let lease_from_now = self.lease_from_now();
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        let owner = session.owner.take();
        let fresh = owner.is_none();
        if owner.as_ref().map(|owner| owner.transaction) != Some(transaction) {
            info!(
                agent,
                multicast_address = %Ipv6Addr::from(multicast_address),
                agent_address = %Ipv6Addr::from(agent_address),
                "Session begins"
            );
        }
        let known: BTreeSet<StreamKey> = owner
            .filter(|owner| owner.transaction == transaction)
            .map(|owner| owner.named)
            .unwrap_or_default();
        let news: Vec<StreamKey> = named.difference(&known).copied().collect();
        session.owner = Some(Owner {
            agent: agent.to_owned(),
            transaction,
            named,
        });
        session.lease_end = lease_from_now;
        let lease_end = session.lease_end;
        let refiltered = session.filter != filter;
        session.filter = filter;
        let unwanted: Vec<StreamKey> = session
            .flows
            .keys()
            .filter(|stream| !session.filter.accepts(&stream.source))
            .copied()
            .collect();
        let kept: Vec<StreamKey> = session
            .flows
            .keys()
            .filter(|stream| session.filter.accepts(&stream.source))
            .copied()
            .collect();
        session.resolving |= fresh;
        self.timers.set(Timer::Lease(number), lease_end);
        if refiltered {
            self.rejoin(&multicast_address);
        }
        for stream in kept {
            self.write_subscriber(number, &stream, false);
        }
        for stream in unwanted {
            self.unsubscribe(number, &stream);
        }
        self.subscribe_known(number, &multicast_address, &news);
        if fresh {
            self.resolve(number);
        } else {
            // `announce` sends nothing while the next hop is being resolved.
            self.announce(number);
        }
    }

    /// Subscribes a session to every seen flow that its filter accepts, and to the flows that its agent
    /// names.
    fn subscribe_known(&mut self, number: u64, multicast_address: &Address, named: &[StreamKey]) {
        let Some(group) = self.groups.get(multicast_address) else {
            return;
        };
        let Some(session) = self.sessions.get(&number) else {
            return;
        };
        let known: Vec<StreamKey> = group
            .streams
            .iter()
            .filter(|(stream, state)| state.seen && session.filter.accepts(&stream.source))
            .map(|(stream, _)| *stream)
            .collect();
        for stream in known {
            self.subscribe(number, &stream);
        }
        for stream in named {
            // A named flow without room is not recorded.
            let room = self
                .sessions
                .get(&number)
                .is_some_and(|session| session.flows.len() < self.config.limits.flows_per_session);
            if room && let Some(group) = self.groups.get_mut(multicast_address) {
                let now = self.now;
                group
                    .streams
                    .entry(*stream)
                    .or_insert_with(|| StreamState::new(now, false));
                self.subscribe(number, stream);
            }
        }
    }

    /// Moves a session's copies to another agent address, with new ports.
    fn move_session(&mut self, number: u64, agent_address: Address) {
        let Some(session) = self.sessions.get(&number) else {
            return;
        };
        let old = session.agent_address;
        if old == agent_address {
            return;
        }
        let streams: Vec<StreamKey> = session.flows.keys().copied().collect();
        for stream in &streams {
            self.unsubscribe(number, stream);
        }
        self.forget_neighbour(number, old);
        self.neighbours
            .entry(agent_address)
            .or_default()
            .insert(number);
        if let Some(session) = self.sessions.get_mut(&number) {
            session.agent_address = agent_address;
            // The renewal that caused the move restores the next hop and the flows.
            session.owner = None;
        }
    }

    /// Requests the next hop to a session's agent.
    pub(super) fn resolve(&mut self, number: u64) {
        if let Some(session) = self.sessions.get(&number) {
            self.outputs.push_back(RelayOutput::Resolve {
                agent_address: session.agent_address.into(),
            });
        }
    }

    fn forget_neighbour(&mut self, number: u64, agent_address: Address) {
        if let Some(sessions) = self.neighbours.get_mut(&agent_address) {
            sessions.remove(&number);
            if sessions.is_empty() {
                self.neighbours.remove(&agent_address);
                self.outputs.push_back(RelayOutput::Forget {
                    agent_address: agent_address.into(),
                });
            }
        }
    }

    pub(super) fn neighbour_known(&mut self, agent_address: Ipv6Addr, result: Result<(), String>) {
        let waiting: Vec<u64> = self
            .neighbours
            .get(&agent_address.octets())
            .into_iter()
            .flatten()
            .filter(|number| self.sessions.get(number).is_some_and(|it| it.resolving))
            .copied()
            .collect();
        match result {
            Ok(()) => {
                for number in waiting {
                    if let Some(session) = self.sessions.get_mut(&number) {
                        session.resolving = false;
                    }
                    self.announce(number);
                }
            }
            Err(reason) => {
                warn!(%agent_address, reason, "Cannot reach an agent");
                for number in waiting {
                    let refusal = Refusal::Unreachable {
                        relay: self.config.name.clone(),
                        address: agent_address,
                        reason: reason.clone(),
                    };
                    self.counters.refused_requests += 1;
                    self.end(number, &refusal);
                }
            }
        }
    }

    /// Handles a failure for an address. The relay refuses unanswered sessions; other sessions continue
    /// unchanged.
    pub(super) fn address_failed(&mut self, key: ManagedKey, reason: &str) {
        let address = Ipv6Addr::from(key.multicast_address);
        let numbers: Vec<u64> = self
            .groups
            .get(&key.multicast_address)
            .map(|group| group.sessions.iter().copied().collect())
            .unwrap_or_default();
        for number in numbers {
            if self.sessions.get(&number).is_some_and(|it| it.resolving) {
                let refusal = Refusal::Failed {
                    relay: self.config.name.clone(),
                    address,
                    reason: reason.to_owned(),
                };
                self.counters.refused_requests += 1;
                self.end(number, &refusal);
            }
        }
    }

    /// Returns the end of a lease that begins now. Agents renew after a third of the lease, so a full
    /// lease remains whenever this process dies.
    pub(super) fn lease_from_now(&self) -> Timestamp {
        self.now + self.config.lease + self.config.lease / 3
    }

    pub(super) fn lease_over(&mut self, number: u64) {
        self.counters.expired_sessions += 1;
        let lease = self.config.lease;
        self.end(number, &Refusal::Expired { lease });
    }

    /// Ends a session and tells its agent the reason.
    pub(super) fn end(&mut self, number: u64, refusal: &Refusal) {
        if let Some(owner) = self.sessions.get(&number).and_then(|it| it.owner.as_ref()) {
            let (agent, transaction) = (owner.agent.clone(), owner.transaction);
            info!(agent, %refusal, "Session ends");
            self.send(&agent, transaction, &RelayRelease(refusal.reason()).into());
        }
        self.remove(number);
    }

    /// Removes a session with its flows, timer, next hop and membership.
    pub(super) fn remove(&mut self, number: u64) {
        let Some(session) = self.sessions.get(&number) else {
            return;
        };
        let multicast_address = session.multicast_address;
        let agent_address = session.agent_address;
        let streams: Vec<StreamKey> = session.flows.keys().copied().collect();
        for stream in &streams {
            self.unsubscribe(number, stream);
        }
        self.timers.stop(Timer::Lease(number));
        self.forget_neighbour(number, agent_address);
        if let Some(owner) = self.sessions.remove(&number).and_then(|it| it.owner) {
            self.names.remove(&(owner.agent, multicast_address));
        }
        let Some(group) = self.groups.get_mut(&multicast_address) else {
            return;
        };
        group.sessions.remove(&number);
        if group.sessions.is_empty() {
            self.groups.remove(&multicast_address);
            let key = managed_key(&multicast_address);
            self.outputs.push_back(RelayOutput::Leave(key));
            self.outputs.push_back(RelayOutput::Unmanage(key));
            if self.groups.is_empty() {
                self.timers.stop(Timer::Measure);
            }
        } else {
            self.rejoin(&multicast_address);
        }
    }
}
