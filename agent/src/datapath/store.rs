//! The listener tables as a [`ListenerStore`], for Reports that an eBPF program could not finish.
//!
//! The kernel may change an entry between two calls. The effect is no worse than that of two
//! Reports in the same microsecond: the rules skip a Report that a later one has overtaken, and
//! applying a frame twice has the same result.

use std::collections::VecDeque;

use common::counter::Counter;
use common::event::{Change, UnfinishedEvent};
use common::maps::{Listener, ListenerKey, Source, SourceKey};
use common::snoop::{Frame, ListenerStore, Refused, apply_frame};

use super::{Datapath, DatapathError};
use crate::proto::DatapathEvent;

struct MapStore<'a> {
    datapath: &'a Datapath,
    events: &'a mut VecDeque<DatapathEvent>,
    /// Listeners refused because the port is at its limit.
    listeners: Vec<ListenerKey>,
    sources: Vec<SourceKey>,
}

impl Datapath {
    /// Applies the frame of an event, and appends the resulting changes.
    pub(super) fn finish(&self, event: &UnfinishedEvent, events: &mut VecDeque<DatapathEvent>) {
        let length = usize::try_from(event.length).unwrap_or(usize::MAX);
        let Some(bytes) = event.frame.get(..length) else {
            return;
        };
        let frame = Frame {
            bytes,
            vlan_metadata: event.vlan_metadata,
        };
        let mut store = MapStore {
            datapath: self,
            events,
            listeners: Vec::new(),
            sources: Vec::new(),
        };
        apply_frame(&frame, event.ifindex, event.bridge, event.at_ns, &mut store);
        let (listeners, sources) = (store.listeners, store.sources);
        if !listeners.is_empty() || !sources.is_empty() {
            events.push_back(DatapathEvent::Refused { listeners, sources });
        }
    }
}

impl MapStore<'_> {
    /// Adds an entry if the port is below its limit. Subtracts the entry from the expired ones,
    /// because the kernel has not counted it.
    fn add(
        &mut self,
        ifindex: u32,
        full: impl FnOnce(&common::maps::Port, &common::maps::PortUsage) -> bool,
        [refusal, map_full]: [Counter; 2],
        (listeners, sources): (i32, i32),
        insert: impl FnOnce(&Datapath) -> Result<bool, DatapathError>,
    ) -> Result<(), Refused> {
        let port = checked(self.datapath.port(ifindex)).flatten();
        let Some((port, usage)) = port else {
            return Err(Refused(Counter::IgnoredPort));
        };
        if full(&port, &usage) {
            return Err(Refused(refusal));
        }
        match insert(self.datapath) {
            Ok(added) => {
                if added {
                    checked(self.datapath.count_expired(ifindex, -listeners, -sources));
                }
                Ok(())
            }
            Err(error) => {
                tracing::error!(ifindex, %error, "Report could not be finished");
                Err(Refused(map_full))
            }
        }
    }
}

impl ListenerStore for MapStore<'_> {
    fn listener(&self, key: &ListenerKey, value: &mut Listener) -> bool {
        let found = checked(self.datapath.inner.listeners.get(key)).flatten();
        found.is_some_and(|found| {
            *value = found;
            true
        })
    }

    fn add_listener(&mut self, key: &ListenerKey, value: &Listener) -> Result<(), Refused> {
        let added = self.add(
            key.ifindex,
            |port, usage| usage.listeners >= port.max_listeners,
            [Counter::RefusedListeners, Counter::ListenersFull],
            (1, 0),
            |datapath| datapath.inner.listeners.insert_new(key, value),
        );
        added.inspect_err(|_| self.listeners.push(*key))
    }

    fn update_listener(&mut self, key: &ListenerKey, value: &Listener) {
        checked(self.datapath.inner.listeners.replace(key, value));
    }

    fn remove_listener(&mut self, key: &ListenerKey) {
        if checked(self.datapath.inner.listeners.remove(key)) == Some(true) {
            checked(self.datapath.count_expired(key.ifindex, 1, 0));
        }
    }

    fn source(&self, key: &SourceKey) -> Option<Source> {
        checked(self.datapath.inner.sources.get(key)).flatten()
    }

    fn add_source(&mut self, key: &SourceKey, value: &Source) -> Result<(), Refused> {
        let added = self.add(
            key.listener.ifindex,
            |port, usage| usage.sources >= port.max_sources,
            [Counter::RefusedSources, Counter::SourcesFull],
            (0, 1),
            |datapath| datapath.inner.sources.insert_new(key, value),
        );
        added.inspect_err(|_| self.sources.push(*key))
    }

    fn update_source(&mut self, key: &SourceKey, value: &Source) {
        checked(self.datapath.inner.sources.replace(key, value));
    }

    fn remove_source(&mut self, key: &SourceKey) {
        if checked(self.datapath.inner.sources.remove(key)) == Some(true) {
            checked(self.datapath.count_expired(key.listener.ifindex, 0, 1));
        }
    }

    fn listener_changed(&mut self, change: Change, key: &ListenerKey, value: &Listener) {
        self.events.push_back(DatapathEvent::Listener {
            change,
            key: *key,
            value: *value,
        });
    }

    fn source_changed(&mut self, change: Change, key: &SourceKey, value: &Source) {
        self.events.push_back(DatapathEvent::Source {
            change,
            key: *key,
            value: *value,
        });
    }

    fn count(&mut self, counter: Counter) {
        self.datapath.count(counter);
    }
}

/// Logs the error of a map operation, because the rules cannot fail.
fn checked<T>(result: Result<T, DatapathError>) -> Option<T> {
    result
        .inspect_err(|error| tracing::error!(%error, "Report could not be finished"))
        .ok()
}
