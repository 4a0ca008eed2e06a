//! State of the unicast relay in the maps: what an agent restores, and what a relay sends.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use common::maps::{
    RelayFlow, RelayFlowEntry, RelayFlowKey, RelayKey, RelayStream, StreamKey, StreamUsage,
    Subscriber, SubscriberKey, SubscriberUsage,
};

use super::table::Table;
use super::{Datapath, DatapathError, lock};

/// The flows that an agent restores, and which relays they come from. Written by this process
/// only, so a lock keeps the second map right.
pub(super) struct RelayFlows {
    flows: Table<RelayFlowKey, RelayFlowEntry>,
    relays: Table<RelayKey, u32>,
    /// What came by relayed flows that are not restored any more.
    ended: BTreeMap<StreamKey, StreamUsage>,
}

impl RelayFlows {
    /// Takes both maps over. The numbers of flows are counted anew: an agent may have been killed
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
        for (key, _) in relays.entries()? {
            if !counts.contains_key(&key) {
                relays.remove(&key)?;
            }
        }
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

    /// What came of each flow by relays. Reads a whole map.
    pub(super) fn usages(&self) -> Result<BTreeMap<StreamKey, StreamUsage>, DatapathError> {
        let mut usages = self.ended.clone();
        for (_, entry) in self.flows.entries()? {
            add(&mut usages, entry.flow.stream, &entry.usage);
        }
        Ok(usages)
    }

    /// Forgets what came by flows that are not restored any more.
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
    /// Restores a relayed flow from now on, or changes what it becomes.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], for instance because `RELAY_FLOWS` is full, as for all of these
    /// methods.
    pub fn relay_flow_set(
        &self,
        key: &RelayFlowKey,
        flow: &RelayFlow,
    ) -> Result<(), DatapathError> {
        lock(&self.inner.relay_flows).set(key, flow)
    }

    /// Restores a relayed flow no more; `false` if it was not there.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn relay_flow_remove(&self, key: &RelayFlowKey) -> Result<bool, DatapathError> {
        lock(&self.inner.relay_flows).remove(key)
    }

    /// All relayed flows that are restored. Reads a whole map.
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

    /// Sends copies of a flow to its subscribers from now on, or changes their number.
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

    /// Sends copies of a flow no more; `false` if it was not there.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn relay_stream_remove(&self, key: &StreamKey) -> Result<bool, DatapathError> {
        self.inner.relay_streams.remove(key)
    }

    /// All flows that have subscribers. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn relay_streams(&self) -> Result<Vec<(StreamKey, RelayStream)>, DatapathError> {
        self.inner.relay_streams.entries()
    }

    /// Writes a subscriber, for instance with a later end of its lease.
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

    /// Removes a subscriber; `false` if it was not there. Its usage stays until it is reset.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscriber_remove(&self, key: &SubscriberKey) -> Result<bool, DatapathError> {
        self.inner.subscribers.remove(key)
    }

    /// All subscribers. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscribers(&self) -> Result<Vec<(SubscriberKey, Subscriber)>, DatapathError> {
        self.inner.subscribers.entries()
    }

    /// What was sent to each subscriber. Reads a whole map.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscriber_usages(
        &self,
    ) -> Result<Vec<(SubscriberKey, SubscriberUsage)>, DatapathError> {
        self.inner.subscriber_usage.entries()
    }

    /// Counts a subscriber's usage from zero again: its index goes to another one.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn subscriber_usage_reset(&self, key: &SubscriberKey) -> Result<(), DatapathError> {
        self.inner.subscriber_usage.remove(key).map(drop)
    }
}
