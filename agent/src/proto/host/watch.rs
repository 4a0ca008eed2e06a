//! What the kernel reports of listeners: the mirror is kept up to date, and the addresses are watched
//! that somebody listens to.

use std::collections::BTreeSet;

use common::event::Change;
use tracing::debug;

use crate::proto::filter::is_routable;
use crate::proto::host::listeners::Effect;
use crate::proto::{Agent, DatapathEvent, Output, Timestamp};

/// Entries read again by one output.
const READ_BATCH: usize = 1024;

impl Agent {
    pub(in crate::proto) fn on_datapath(&mut self, event: DatapathEvent) {
        match event {
            DatapathEvent::Listener {
                change: Change::Updated,
                key,
                value,
            } => {
                let effect = self.mirror.update_listener(key, value);
                self.apply(effect);
                self.refresh_filter(key.managed());
                self.arrived_vm_reported(&key);
            }
            DatapathEvent::Listener {
                change: Change::Removed,
                key,
                ..
            } => {
                let known = self.mirror.get(&key).is_some();
                let effect = self.mirror.remove_listener(&key);
                self.apply(effect);
                // The answer for an entry that never was does not mean that the VM has left.
                if known {
                    self.arrived_vm_left(&key);
                }
            }
            DatapathEvent::Source { change, key, value } => {
                match change {
                    Change::Updated => self.mirror.update_source(key, value),
                    Change::Removed => self.mirror.remove_source(&key),
                }
                self.refresh_filter(key.listener.managed());
            }
            DatapathEvent::FirstPacket { key, origin, at } => {
                self.first_packet(&key, origin, at);
                self.receptions.packet(&mut self.cx, &key, origin, at);
            }
            DatapathEvent::Query { key, value } => {
                self.mirror.update_querier(key, value);
                self.query_came(key.vlan, Timestamp(value.last_query_ns));
            }
            DatapathEvent::Snapshot {
                listeners,
                sources,
                queriers,
            } => {
                for (key, value) in queriers {
                    self.mirror.update_querier(key, value);
                    self.query_came(key.vlan, Timestamp(value.last_query_ns));
                }
                let (mut gone_listeners, mut gone_sources) = self.mirror.keys();
                for (key, value) in listeners {
                    gone_listeners.remove(&key);
                    let effect = self.mirror.update_listener(key, value);
                    self.apply(effect);
                    self.arrived_vm_reported(&key);
                }
                let mut listed = BTreeSet::new();
                for (key, value) in sources {
                    gone_sources.remove(&key);
                    self.mirror.update_source(key, value);
                    listed.insert(key.listener.managed());
                }
                for address in listed {
                    self.refresh_filter(address);
                }
                // Events may have been lost, those that end probes among them.
                self.read_probed_streams();
                // What the snapshot lacks may also have come while it was taken.
                self.read_again(
                    gone_listeners.into_iter().collect(),
                    gone_sources.into_iter().collect(),
                );
            }
            DatapathEvent::Usage { ifindex, usage } => {
                self.usage
                    .read(self.cx.now, &self.inventory, ifindex, usage);
            }
            DatapathEvent::Streams { token, streams } => {
                let (departures, cx, around) = self.departing();
                if !departures.streams_read(cx, &around, token, &streams)
                    && !self.receptions.streams_read(&mut self.cx, token, &streams)
                {
                    self.streams_read(token, &streams);
                }
            }
            DatapathEvent::Refused { listeners, sources } => {
                self.reports_refused(&listeners, &sources);
            }
            DatapathEvent::Failed { key, reason } => {
                self.usage.failed(self.cx.now, &key, &reason);
                self.join_failed(key);
            }
        }
    }

    /// Forgets the listeners of a port that is gone. Its VM sends no leave, so the querier is
    /// made to ask for those addresses that nobody else here listens to.
    pub(in crate::proto) fn forget_listeners(&mut self, ifindex: u32) {
        let keys: Vec<_> = self.mirror.of_port(ifindex).map(|view| view.key).collect();
        for key in keys {
            let effect = self.mirror.remove_listener(&key);
            let address = key.managed();
            if matches!(effect, Some(Effect::Vanished(_)))
                && !self.entries.contains_key(&address)
                && is_routable(&address.multicast_address)
            {
                self.cx.outputs.push_back(Output::Prune(address));
            }
            self.apply(effect);
        }
    }

    pub(in crate::proto) fn age_listeners(&mut self) {
        let due = self.mirror.expire(self.cx.now);
        for (key, last_report_ns) in due.expire_sources {
            self.cx.outputs.push_back(Output::ExpireSource {
                key,
                last_report_ns,
            });
        }
        for (key, last_report_ns) in due.expire_listeners {
            debug!(ifindex = key.ifindex, "Listener is too old");
            self.cx.outputs.push_back(Output::ExpireListener {
                key,
                last_report_ns,
            });
        }
        self.read_again(due.read_listeners, due.read_sources);
    }

    fn read_again(
        &mut self,
        listeners: Vec<common::maps::ListenerKey>,
        sources: Vec<common::maps::SourceKey>,
    ) {
        for listeners in listeners.chunks(READ_BATCH) {
            self.cx.outputs.push_back(Output::ReadListeners {
                listeners: listeners.to_vec(),
                sources: Vec::new(),
            });
        }
        for sources in sources.chunks(READ_BATCH) {
            self.cx.outputs.push_back(Output::ReadListeners {
                listeners: Vec::new(),
                sources: sources.to_vec(),
            });
        }
    }

    fn apply(&mut self, effect: Option<Effect>) {
        match effect {
            Some(Effect::Appeared(key)) => {
                let wanted = self.wanted(&key);
                self.receptions.receive(&mut self.cx, key, wanted);
            }
            Some(Effect::Vanished(key)) if is_routable(&key.multicast_address) => {
                self.unmanage_unneeded(key);
            }
            _ => {}
        }
    }
}
