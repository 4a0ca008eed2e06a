//! Flows and their subscribers, as entries of `RELAY_STREAMS` and `RELAY_SUBSCRIBERS`.
//!
//! A subscriber keeps its index. If the relay moved a subscriber into a gap, the subscriber would
//! briefly receive every packet twice, or none. The relay assigns the lowest free index first and cuts
//! free indices at the end, so the kernel visits few gaps. The relay writes a subscriber's entry before
//! the flow's count includes the index, and removes the entry after the count excludes the index.

use common::maps::{Address, ManagedKey, StreamKey, Subscriber, SubscriberKey};
use common::relay::{Endpoints, to_agent};

use super::stream::{Served, StreamState};
use super::{RelayOutput, RelayServer, SessionFlow, Timer, Timestamp, managed_key};
use crate::proto::Stream;
use crate::proto::filter::Filter;

impl RelayServer {
    /// Handles the first packet of a flow since its address became managed.
    pub(super) fn stream_seen(&mut self, stream: &StreamKey, at: Timestamp) {
        if stream.vlan != 0 {
            return;
        }
        if !self.make_room(stream) {
            self.counters.refused_flows += 1;
            return;
        }
        let Some(group) = self.groups.get_mut(&stream.multicast_address) else {
            return;
        };
        let state = group
            .streams
            .entry(*stream)
            .or_insert_with(|| StreamState::new(at, true));
        state.seen = true;
        state.last_seen = state.last_seen.max(at);
        for number in group.sessions.clone() {
            let wanted = self.sessions.get(&number).is_some_and(|session| {
                session.filter.accepts(&stream.source) && !session.flows.contains_key(stream)
            });
            if wanted {
                self.drop_unseen(number);
                if self.subscribe(number, stream) {
                    self.announce(number);
                }
            }
        }
    }

    /// Makes room for one more seen flow; returns true if there is room. A sender with made-up ports
    /// fills an address only for a while, because paused flows give way.
    fn make_room(&mut self, stream: &StreamKey) -> bool {
        let Some(group) = self.groups.get(&stream.multicast_address) else {
            return false;
        };
        if group.streams.get(stream).is_some_and(|state| state.seen) {
            return true;
        }
        let seen = || group.streams.iter().filter(|(_, state)| state.seen);
        if seen().count() < self.config.limits.flows_per_session {
            return true;
        }
        let paused = self.config.measure_interval * 2;
        let oldest = seen()
            .min_by_key(|(_, state)| state.last_seen)
            .filter(|(_, state)| self.now.since(state.last_seen) > paused)
            .map(|(key, _)| *key);
        if let Some(oldest) = oldest {
            self.drop_stream(&oldest);
        }
        oldest.is_some()
    }

    /// In a full session, drops a flow that was only named, in favour of a flow with packets.
    fn drop_unseen(&mut self, number: u64) {
        let Some(session) = self.sessions.get(&number) else {
            return;
        };
        if session.flows.len() < self.config.limits.flows_per_session {
            return;
        }
        let Some(group) = self.groups.get(&session.multicast_address) else {
            return;
        };
        let unseen = session
            .flows
            .keys()
            .find(|stream| group.streams.get(*stream).is_none_or(|state| !state.seen))
            .copied();
        if let Some(stream) = unseen {
            self.unsubscribe(number, &stream);
        }
    }

    /// Handles the flows read from `STREAMS`.
    pub(super) fn streams_read(&mut self, streams: &[(StreamKey, Stream)]) {
        for (key, stream) in streams {
            let Some(group) = self.groups.get_mut(&key.multicast_address) else {
                continue;
            };
            let last = Timestamp(stream.native.last_ns);
            if let Some(state) = group.streams.get_mut(key)
                && state.seen
            {
                state.measure(self.now, stream);
            } else if last >= group.since && self.now.since(last) <= self.config.flow_silence {
                // The first-packet event was lost.
                self.stream_seen(key, last);
            }
        }
        self.drop_silent_streams();
    }

    fn drop_silent_streams(&mut self) {
        let silence = self.config.flow_silence;
        let silent: Vec<StreamKey> = self
            .groups
            .values()
            .flat_map(|group| &group.streams)
            .filter(|(_, state)| self.now.since(state.last_seen) > silence)
            .map(|(key, _)| *key)
            .collect();
        for stream in silent {
            self.drop_stream(&stream);
        }
    }

    /// Forgets a flow and stops sending the flow.
    fn drop_stream(&mut self, stream: &StreamKey) {
        let sessions: Vec<u64> = self
            .groups
            .get(&stream.multicast_address)
            .and_then(|group| group.streams.get(stream)?.served.as_ref())
            .map(|served| served.subscribers.iter().flatten().copied().collect())
            .unwrap_or_default();
        for number in sessions {
            self.unsubscribe(number, stream);
            self.announce(number);
        }
        if let Some(group) = self.groups.get_mut(&stream.multicast_address) {
            group.streams.remove(stream);
        }
    }

    /// Requests a reading of the streams, periodically while there are groups.
    pub(super) fn measure(&mut self) {
        if self.groups.is_empty() {
            return;
        }
        let keys: Vec<ManagedKey> = self.groups.keys().map(managed_key).collect();
        self.outputs.push_back(RelayOutput::ReadStreams { keys });
        let due = self.now + self.config.measure_interval;
        self.timers.set(Timer::Measure, due);
    }

    /// Subscribes a session to a known flow; returns true if the session did not have the flow.
    pub(super) fn subscribe(&mut self, number: u64, stream: &StreamKey) -> bool {
        let Some(session) = self.sessions.get_mut(&number) else {
            return false;
        };
        if session.flows.contains_key(stream) {
            return false;
        }
        if session.flows.len() >= self.config.limits.flows_per_session {
            self.counters.refused_flows += 1;
            return false;
        }
        let Some(state) = self
            .groups
            .get_mut(&stream.multicast_address)
            .and_then(|group| group.streams.get_mut(stream))
        else {
            return false;
        };
        let served = state.served.get_or_insert_with(|| Served {
            flow: self.flow_numbers.take(),
            subscribers: Vec::new(),
        });
        let before = served.value();
        let relay_address = self.config.address.octets();
        let Some(index) = served.add(number) else {
            self.counters.refused_flows += 1;
            return false;
        };
        let key = SubscriberKey {
            flow: served.flow,
            index,
        };
        let agent_address = session.agent_address;
        let Some(ports) = self.ports.take(stream, &relay_address, &agent_address) else {
            served.remove(index);
            if served.subscribers.is_empty() {
                self.flow_numbers.release(served.flow);
                state.served = None;
            }
            self.counters.refused_flows += 1;
            return false;
        };
        let after = served.value();
        session.flows.insert(*stream, SessionFlow { ports, key });
        self.write_subscriber(number, stream, true);
        if after != before {
            self.outputs.push_back(RelayOutput::StreamSet {
                key: *stream,
                value: after,
            });
        }
        true
    }

    /// Stops sending a flow to a session.
    pub(super) fn unsubscribe(&mut self, number: u64, stream: &StreamKey) {
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        let Some(flow) = session.flows.remove(stream) else {
            return;
        };
        self.ports.release(&session.agent_address, flow.ports);
        let state = self
            .groups
            .get_mut(&stream.multicast_address)
            .and_then(|group| group.streams.get_mut(stream));
        if let Some(state) = state
            && let Some(served) = &mut state.served
        {
            let before = served.value();
            served.remove(flow.key.index);
            let after = served.value();
            if after.subscribers == 0 {
                self.outputs.push_back(RelayOutput::StreamRemove(*stream));
                self.flow_numbers.release(served.flow);
                state.served = None;
            } else if after != before {
                self.outputs.push_back(RelayOutput::StreamSet {
                    key: *stream,
                    value: after,
                });
            }
        }
        self.outputs
            .push_back(RelayOutput::SubscriberRemove(flow.key));
    }

    /// Writes the subscriber entry of a session's flow, including the lease.
    pub(super) fn write_subscriber(&mut self, number: u64, stream: &StreamKey, reset_usage: bool) {
        let Some(session) = self.sessions.get(&number) else {
            return;
        };
        let Some(flow) = session.flows.get(stream) else {
            return;
        };
        let endpoints = Endpoints {
            relay_address: self.config.address.octets(),
            relay_port: flow.ports.relay,
            agent_address: session.agent_address,
            agent_port: flow.ports.agent,
        };
        let address_difference = to_agent(stream, &endpoints);
        self.outputs.push_back(RelayOutput::SubscriberSet {
            stream: *stream,
            key: flow.key,
            value: Subscriber {
                lease_end_ns: session.lease_end.0,
                relay_address: endpoints.relay_address,
                agent_address: endpoints.agent_address,
                relay_port: endpoints.relay_port,
                agent_port: endpoints.agent_port,
                address_difference,
            },
            reset_usage,
        });
    }

    /// Returns the rate of all copies to one agent, or to all agents.
    pub(super) fn bits_per_second(&self, agent: Option<&str>) -> u64 {
        self.sessions
            .values()
            .filter(|session| {
                agent.is_none() || session.owner.as_ref().map(|owner| owner.agent.as_str()) == agent
            })
            .flat_map(|session| {
                let group = self.groups.get(&session.multicast_address);
                session
                    .flows
                    .keys()
                    .map(move |stream| group.map_or(0, |group| group.bits_per_second(stream)))
            })
            .fold(0, u64::saturating_add)
    }

    /// Returns the known rate of an address's flows that a filter accepts.
    pub(super) fn rate_of(&self, multicast_address: &Address, filter: &Filter) -> u64 {
        self.groups.get(multicast_address).map_or(0, |group| {
            group
                .streams
                .iter()
                .filter(|(stream, _)| filter.accepts(&stream.source))
                .map(|(_, state)| state.bits_per_second)
                .fold(0, u64::saturating_add)
        })
    }
}
