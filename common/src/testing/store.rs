//! Listener tables in memory, for tests of the rules alone and as the kernel's counterpart.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what fails here is the test that asked for it"
)]

use std::collections::{BTreeMap, HashMap};
use std::vec::Vec;

use crate::counter::Counter;
use crate::event::Change;
use crate::maps::{Listener, ListenerKey, Source, SourceKey};
use crate::snoop::{ListenerStore, Refused};

/// Tables, events and counters.
#[derive(Debug)]
pub struct MemoryStore {
    /// Counterpart of the map `LISTENERS`.
    pub listeners: HashMap<ListenerKey, Listener>,
    /// Counterpart of `LISTENER_SOURCES`, including stale entries.
    pub sources: HashMap<SourceKey, Source>,
    /// Listener events: change, key and value.
    pub listener_events: Vec<(Change, ListenerKey, Listener)>,
    /// Source events: change, key and value.
    pub source_events: Vec<(Change, SourceKey, Source)>,
    /// Counters that are not zero.
    pub counters: BTreeMap<Counter, u64>,
    /// Limit of listeners.
    pub max_listeners: usize,
    /// Limit of sources.
    pub max_sources: usize,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self {
            listeners: HashMap::new(),
            sources: HashMap::new(),
            listener_events: Vec::new(),
            source_events: Vec::new(),
            counters: BTreeMap::new(),
            max_listeners: usize::MAX,
            max_sources: usize::MAX,
        }
    }
}

impl ListenerStore for MemoryStore {
    fn listener(&self, key: &ListenerKey, value: &mut Listener) -> bool {
        self.listeners
            .get(key)
            .map(|found| *value = *found)
            .is_some()
    }

    fn add_listener(&mut self, key: &ListenerKey, value: &Listener) -> Result<(), Refused> {
        if self.listeners.len() >= self.max_listeners {
            return Err(Refused(Counter::RefusedListeners));
        }
        assert!(
            self.listeners.insert(*key, *value).is_none(),
            "listener was there"
        );
        Ok(())
    }

    fn update_listener(&mut self, key: &ListenerKey, value: &Listener) {
        if let Some(listener) = self.listeners.get_mut(key) {
            *listener = *value;
        }
    }

    fn remove_listener(&mut self, key: &ListenerKey) {
        self.listeners.remove(key);
    }

    fn source(&self, key: &SourceKey) -> Option<Source> {
        self.sources.get(key).copied()
    }

    fn add_source(&mut self, key: &SourceKey, value: &Source) -> Result<(), Refused> {
        if self.sources.len() >= self.max_sources {
            return Err(Refused(Counter::RefusedSources));
        }
        assert!(
            self.sources.insert(*key, *value).is_none(),
            "source was there"
        );
        Ok(())
    }

    fn update_source(&mut self, key: &SourceKey, value: &Source) {
        if let Some(source) = self.sources.get_mut(key) {
            *source = *value;
        }
    }

    fn remove_source(&mut self, key: &SourceKey) {
        self.sources.remove(key);
    }

    fn listener_changed(&mut self, change: Change, key: &ListenerKey, value: &Listener) {
        self.listener_events.push((change, *key, *value));
    }

    fn source_changed(&mut self, change: Change, key: &SourceKey, value: &Source) {
        self.source_events.push((change, *key, *value));
    }

    fn count(&mut self, counter: Counter) {
        *self.counters.entry(counter).or_default() += 1;
    }
}

/// A listener without times: filter mode, version, MAC, whether it answered a Query, and its
/// sources with their filter mode.
pub type Meaning = (u8, u8, [u8; 6], bool, Vec<([u8; 16], u8)>);

/// Returns the tables without times, generations and stale entries.
pub fn meaning<L, S>(listeners: L, sources: S) -> BTreeMap<ListenerKey, Meaning>
where
    L: IntoIterator<Item = (ListenerKey, Listener)>,
    S: IntoIterator<Item = (SourceKey, Source)>,
{
    let sources: Vec<_> = sources.into_iter().collect();
    let mut meaning = BTreeMap::new();
    for (key, listener) in listeners {
        let mut list: Vec<_> = sources
            .iter()
            .filter(|(source, value)| {
                source.listener == key && value.generation == listener.generation
            })
            .map(|(source, value)| (source.source, value.filter_mode))
            .collect();
        list.sort_unstable();
        assert_eq!(
            list.len(),
            listener.source_count as usize,
            "sources of {key:?}"
        );
        let answered = listener.last_answer_ns != 0;
        meaning.insert(
            key,
            (
                listener.filter_mode,
                listener.mld_version,
                listener.guest_mac,
                answered,
                list,
            ),
        );
    }
    meaning
}
