//! Kernel's events about listeners: updates of the mirror, and effects on other modules.

use std::collections::{BTreeSet, VecDeque};

use common::event::Change;
use common::group;
use common::maps::{Listener, ListenerKey, Querier, QuerierKey, Source, SourceKey};
use tracing::debug;

use super::listeners::{Effect, Mirror};
use crate::proto::context::Context;
use crate::proto::timer::Timer;
use crate::proto::{Output, Timestamp};

/// Limit of entries per read request.
const READ_BATCH: usize = 1024;

/// A reported change that the mirror does not contain yet. A snapshot is split into several changes, so
/// the effects of one change do not see later changes.
#[derive(Debug)]
enum Seen {
    /// State of a listener; `alone` is false if the state comes from a snapshot.
    Listener {
        key: ListenerKey,
        value: Listener,
        alone: bool,
    },
    ListenerGone(ListenerKey),
    /// The port of a listener was removed; the VM sent no leave.
    PortGone(ListenerKey),
    Sources(Vec<(SourceKey, Source)>),
    SourceGone(SourceKey),
    Querier(QuerierKey, Querier),
    /// Events may be lost.
    Gap,
    /// Entries that a snapshot lacks.
    Missing(BTreeSet<ListenerKey>, BTreeSet<SourceKey>),
}

/// Pending changes and effects.
#[derive(Debug, Default)]
pub(super) struct Watch {
    seen: VecDeque<Seen>,
    effects: VecDeque<Effect>,
}

impl Mirror {
    /// Queues a change of a listener.
    pub(in crate::proto) fn listener_seen(
        &mut self,
        change: Change,
        key: ListenerKey,
        value: Listener,
    ) {
        let alone = true;
        self.watch.seen.push_back(match change {
            Change::Updated => Seen::Listener { key, value, alone },
            Change::Removed => Seen::ListenerGone(key),
        });
    }

    /// Queues a change of a source.
    pub(in crate::proto) fn source_seen(&mut self, change: Change, key: SourceKey, value: Source) {
        self.watch.seen.push_back(match change {
            Change::Updated => Seen::Sources(vec![(key, value)]),
            Change::Removed => Seen::SourceGone(key),
        });
    }

    /// Queues an MLD General Query that the uplink received.
    pub(in crate::proto) fn query_seen(&mut self, key: QuerierKey, value: Querier) {
        self.watch.seen.push_back(Seen::Querier(key, value));
    }

    /// Queues the content of all maps.
    pub(in crate::proto) fn snapshot_seen(
        &mut self,
        listeners: Vec<(ListenerKey, Listener)>,
        sources: Vec<(SourceKey, Source)>,
        queriers: Vec<(QuerierKey, Querier)>,
    ) {
        let (mut gone_listeners, mut gone_sources) = self.keys();
        for (key, _) in &listeners {
            gone_listeners.remove(key);
        }
        for (key, _) in &sources {
            gone_sources.remove(key);
        }
        let seen = &mut self.watch.seen;
        seen.extend(queriers.into_iter().map(|(key, it)| Seen::Querier(key, it)));
        let alone = false;
        seen.extend(
            listeners
                .into_iter()
                .map(|(key, value)| Seen::Listener { key, value, alone }),
        );
        seen.push_back(Seen::Sources(sources));
        // The lost events may include events that end probes.
        seen.push_back(Seen::Gap);
        // An entry missing in the snapshot may also have been added while the snapshot was taken.
        seen.push_back(Seen::Missing(gone_listeners, gone_sources));
    }

    /// Queues the loss of a removed port's listeners.
    pub(in crate::proto) fn port_gone(&mut self, ifindex: u32) {
        let keys: Vec<_> = self.of_port(ifindex).map(|view| view.key).collect();
        self.watch.seen.extend(keys.into_iter().map(Seen::PortGone));
    }

    /// Applies queued changes and returns the next effect. Until the result is `None`, the mirror lags
    /// behind the reports.
    pub(in crate::proto) fn poll_effect(&mut self, cx: &mut Context) -> Option<Effect> {
        loop {
            if let Some(effect) = self.watch.effects.pop_front() {
                return Some(effect);
            }
            let seen = self.watch.seen.pop_front()?;
            self.take_in(cx, seen);
        }
    }

    fn take_in(&mut self, cx: &mut Context, seen: Seen) {
        match seen {
            Seen::Listener { key, value, alone } => {
                if self.update_listener(key, value) {
                    self.watch
                        .effects
                        .push_back(Effect::Appeared(key.managed()));
                }
                if alone {
                    self.watch.effects.push_back(Effect::Wanted(key.managed()));
                }
                self.watch.effects.push_back(Effect::Reported(key));
            }
            Seen::ListenerGone(key) => {
                let known = self.get(&key).is_some();
                self.remove(&key, true);
                // A read request for an unknown entry also returns a removal, which does not mean that
                // the VM left.
                if known {
                    self.watch.effects.push_back(Effect::Left(key));
                }
            }
            Seen::PortGone(key) => self.remove(&key, false),
            Seen::Sources(sources) => {
                let mut listed = BTreeSet::new();
                for (key, value) in sources {
                    self.update_source(key, value);
                    listed.insert(key.listener.managed());
                }
                let listed = listed.into_iter();
                self.watch.effects.extend(listed.map(Effect::Wanted));
            }
            Seen::SourceGone(key) => {
                self.remove_source(&key);
                let address = key.listener.managed();
                self.watch.effects.push_back(Effect::Wanted(address));
            }
            Seen::Querier(key, value) => {
                self.update_querier(key, value);
                self.watch.effects.push_back(Effect::Queried {
                    network: key.network(),
                    at: Timestamp(value.last_query_ns),
                });
            }
            Seen::Gap => self.watch.effects.push_back(Effect::EventsLost),
            Seen::Missing(listeners, sources) => read_again(
                cx,
                listeners.into_iter().collect(),
                sources.into_iter().collect(),
            ),
        }
    }

    fn remove(&mut self, key: &ListenerKey, told: bool) {
        let vanished = self.remove_listener(key);
        if let Some(key) = vanished.filter(|key| group::is_routable(&key.multicast_address)) {
            self.watch.effects.push_back(Effect::Vanished { key, told });
        }
    }

    /// Arms the timer for the next entry that may expire.
    pub(in crate::proto) fn set_timer(&self, cx: &mut Context) {
        match self.next_due() {
            Some(due) => cx.timers.set(Timer::Ageing, due),
            None => cx.timers.stop(Timer::Ageing),
        }
    }

    /// Requests the entries that may be too old, and expires the entries that are.
    pub(in crate::proto) fn age(&mut self, cx: &mut Context) {
        let due = self.expire(cx.now);
        for (key, last_report_ns) in due.expire_sources {
            cx.outputs.push_back(Output::ExpireSource {
                key,
                last_report_ns,
            });
        }
        for (key, last_report_ns) in due.expire_listeners {
            debug!(ifindex = key.ifindex, "Listener is too old");
            cx.outputs.push_back(Output::ExpireListener {
                key,
                last_report_ns,
            });
        }
        read_again(cx, due.read_listeners, due.read_sources);
    }
}

fn read_again(cx: &mut Context, listeners: Vec<ListenerKey>, sources: Vec<SourceKey>) {
    for listeners in listeners.chunks(READ_BATCH) {
        cx.outputs.push_back(Output::ReadListeners {
            listeners: listeners.to_vec(),
            sources: Vec::new(),
        });
    }
    for sources in sources.chunks(READ_BATCH) {
        cx.outputs.push_back(Output::ReadListeners {
            listeners: Vec::new(),
            sources: sources.to_vec(),
        });
    }
}
