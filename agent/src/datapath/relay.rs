//! State of the unicast relay in the maps: flows that an agent restores, and flows that a relay
//! sends.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use common::maps::{
    RelayFlow, RelayFlowEntry, RelayFlowKey, RelayKey, RelayStream, StreamKey, StreamUsage,
    Subscriber, SubscriberKey, SubscriberUsage,
};

use super::table::Table;
use super::{Datapath, DatapathError, lock};

/// `RELAY_FLOWS`, and `RELAYS` with the number of flows per relay. Only this process writes both
/// maps, so one lock keeps them consistent.
pub(super) struct RelayFlows {
    flows: Table<RelayFlowKey, RelayFlowEntry>,
    relays: Table<RelayKey, u32>,
    /// Usage of flows that are no longer restored, by stream.
    ended: BTreeMap<StreamKey, StreamUsage>,
}

impl RelayFlows {
    /// Takes over both maps. Recounts the flows per relay, because an agent may have been killed
    /// between two writes.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub(super) fn adopt(
        flows: Table<RelayFlowKey, RelayFlowEntry>,
        relays: Table<RelayKey, u32>,
    ) -> Result<Self, DatapathError> {
        let mut counts: BTreeMap<RelayKey, u32> = BTreeMap::new();
        for (key, entry) in flows.entries()? {
            *counts.entry(relay(&key, &entry.flow)).or_default() += 1;
        }
        relays.remove_if(|key| !counts.contains_key(key))?;
        for (key, count) in &counts {
            relays.insert(key, count)?;
        }
        Ok(Self {
            flows,
            relays,
            ended: BTreeMap::new(),
        })
    }

    fn set(&mut self, key: &RelayFlowKey, flow: &RelayFlow) -> Result<(), DatapathError> {
        let found = self.flows.get(key)?;
        let mut usage = StreamUsage::default();
        if let Some(found) = found {
            if found.flow == *flow {
                return Ok(());
            }
            if found.flow.stream == flow.stream {
                usage = found.usage;
            }
        }
        let before = found.map(|entry| relay(key, &entry.flow));
        let now = relay(key, flow);
        if before != Some(now) {
            let count = self.relays.get(&now)?.unwrap_or(0);
            self.relays.insert(&now, &(count + 1))?;
        }
        let written = self
            .flows
            .insert(key, &RelayFlowEntry { flow: *flow, usage });
        if written.is_err() {
            if before != Some(now) {
                self.forget(&now)?;
            }
        } else if let Some(before) = before
            && before != now
        {
            self.forget(&before)?;
        }
        if let Some(found) = found
            && found.flow.stream != flow.stream
            && written.is_ok()
        {
            self.end(&found);
        }
        written
    }

    fn remove(&mut self, key: &RelayFlowKey) -> Result<bool, DatapathError> {
        let Some(entry) = self.flows.take(key)? else {
            return Ok(false);
        };
        self.end(&entry);
        self.forget(&relay(key, &entry.flow))?;
        Ok(true)
    }

    fn end(&mut self, entry: &RelayFlowEntry) {
        add(&mut self.ended, entry.flow.stream, &entry.usage);
    }

    /// Returns the packets received through relays, by stream. Reads a whole map.
    pub(super) fn usages(&self) -> Result<BTreeMap<StreamKey, StreamUsage>, DatapathError> {
        let mut usages = self.ended.clone();
        for (_, entry) in self.flows.entries()? {
            add(&mut usages, entry.flow.stream, &entry.usage);
        }
        Ok(usages)
    }

    /// Drops the usage of flows that are no longer restored, for the streams selected by `gone`.
    pub(super) fn forget_usages_if(&mut self, gone: impl Fn(&StreamKey) -> bool) {
        self.ended.retain(|key, _| !gone(key));
    }

    fn forget(&self, key: &RelayKey) -> Result<(), DatapathError> {
        match self.relays.get(key)? {
            Some(count) if count > 1 => self.relays.insert(key, &(count - 1)),
            _ => self.relays.remove(key).map(drop),
        }
    }
}

fn add(usages: &mut BTreeMap<StreamKey, StreamUsage>, key: StreamKey, usage: &StreamUsage) {
    match usages.entry(key) {
        Entry::Vacant(entry) => {
            entry.insert(*usage);
        }
        Entry::Occupied(mut entry) => entry.get_mut().add(usage),
    }
}

fn relay(key: &RelayFlowKey, flow: &RelayFlow) -> RelayKey {
    RelayKey {
        relay_address: key.relay_address,
        agent_address: flow.agent_address,
    }
}

impl Datapath {
    /// Restores a relayed flow, or changes the stream that it is restored to.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], for instance if `RELAY_FLOWS` is full, as for all these methods.
    pub fn relay_flow_set(
        &self,
        key: &RelayFlowKey,
        flow: &RelayFlow,
    ) -> Result<(), DatapathError> {
        lock(&self.inner.relay_flows).set(key, flow)
    }

    /// Stops restoring a relayed flow; returns false if the flow was not restored.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn relay_flow_remove(&self, key: &RelayFlowKey) -> Result<bool, DatapathError> {
        lock(&self.inner.relay_flows).remove(key)
    }

    /// Returns all relayed flows that are restored. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn relay_flows(&self) -> Result<Vec<(RelayFlowKey, RelayFlow)>, DatapathError> {
        let entries = lock(&self.inner.relay_flows).flows.entries()?;
        Ok(entries
            .into_iter()
            .map(|(key, entry)| (key, entry.flow))
            .collect())
    }

    /// Sends copies of a flow to its subscribers, or changes their number.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn relay_stream_set(
        &self,
        key: &StreamKey,
        value: &RelayStream,
    ) -> Result<(), DatapathError> {
        self.inner.relay_streams.insert(key, value)
    }

    /// Stops sending copies of a flow; returns false if none were sent.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn relay_stream_remove(&self, key: &StreamKey) -> Result<bool, DatapathError> {
        self.inner.relay_streams.remove(key)
    }

    /// Returns all flows with subscribers. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn relay_streams(&self) -> Result<Vec<(StreamKey, RelayStream)>, DatapathError> {
        self.inner.relay_streams.entries()
    }

    /// Adds or replaces a subscriber, for instance with a later end of its lease.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscriber_set(
        &self,
        key: &SubscriberKey,
        value: &Subscriber,
    ) -> Result<(), DatapathError> {
        self.inner.subscribers.insert(key, value)
    }

    /// Removes a subscriber; returns false if there was none. Its usage stays until it is reset.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscriber_remove(&self, key: &SubscriberKey) -> Result<bool, DatapathError> {
        self.inner.subscribers.remove(key)
    }

    /// Returns all subscribers. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscribers(&self) -> Result<Vec<(SubscriberKey, Subscriber)>, DatapathError> {
        self.inner.subscribers.entries()
    }

    /// Returns what was sent to each subscriber. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscriber_usages(
        &self,
    ) -> Result<Vec<(SubscriberKey, SubscriberUsage)>, DatapathError> {
        self.inner.subscriber_usage.entries()
    }

    /// Resets the usage of a subscriber's index to zero, for the next subscriber with that index.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscriber_usage_reset(&self, key: &SubscriberKey) -> Result<(), DatapathError> {
        self.inner.subscriber_usage.remove(key).map(drop)
    }
}
