//! Effect of an agent's outputs on its host: joins, bridge entries, map entries and gates. Each is
//! created before its removal, and removed once.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use common::maps::{Listener, ListenerKey, ManagedKey, RelayFlowKey, Source, SourceKey};

use crate::proto::*;

/// State of a TAP's gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proto) enum Gate {
    Records,
    Holds,
    Replays,
}

/// State of the host.
#[derive(Debug, Default)]
pub(in crate::proto) struct Kernel {
    pub(in crate::proto) joined: BTreeMap<ManagedKey, Membership>,
    pub(in crate::proto) managed: BTreeSet<ManagedKey>,
    pub(in crate::proto) mdb: BTreeSet<(u32, ManagedKey)>,
    pub(in crate::proto) flows: BTreeSet<RelayFlowKey>,
    pub(in crate::proto) gates: BTreeMap<u32, Gate>,
    pub(in crate::proto) watched: BTreeSet<Ipv6Addr>,
    pub(in crate::proto) forwards: BTreeSet<LinkAddress>,
    pub(in crate::proto) translations: BTreeSet<(u32, LinkAddress)>,
    pub(in crate::proto) listeners: BTreeMap<ListenerKey, Listener>,
    pub(in crate::proto) sources: BTreeMap<SourceKey, Source>,
}

impl Kernel {
    /// Applies an output.
    pub(in crate::proto) fn apply(&mut self, output: &Output) {
        match output {
            Output::Join(membership) => {
                let key = membership.key;
                assert!(self.managed.contains(&key), "joined but not watched");
                self.joined.insert(key, membership.clone());
            }
            Output::Leave(key) => assert!(self.joined.remove(key).is_some(), "left twice"),
            Output::Manage { key, .. } => {
                self.managed.insert(*key);
            }
            Output::Unmanage(key) => {
                assert!(
                    !self.joined.contains_key(key),
                    "joined but no longer watched"
                );
                assert!(self.managed.remove(key), "given up twice");
            }
            Output::RelayFlowSet { key, .. } => {
                self.flows.insert(*key);
            }
            Output::RelayFlowRemove(key) => assert!(self.flows.remove(key), "removed twice"),
            Output::MdbAdd {
                ifindex,
                membership,
            } => {
                self.mdb.insert((*ifindex, membership.key));
            }
            Output::MdbDelete(entry) if entry.source.is_none() => {
                self.mdb.remove(&(entry.ifindex, entry.key));
            }
            Output::ExpireListener {
                key,
                last_report_ns,
            } => {
                let old = |value: &Listener| value.last_report_ns <= *last_report_ns;
                if self.listeners.get(key).is_some_and(old) {
                    self.listeners.remove(key);
                    self.sources.retain(|source, _| source.listener != *key);
                }
            }
            Output::ExpireSource {
                key,
                last_report_ns,
            } => {
                let old = |value: &Source| value.last_report_ns <= *last_report_ns;
                if self.sources.get(key).is_some_and(old) {
                    self.sources.remove(key);
                }
            }
            Output::Gate(command) => self.gate(command),
            Output::Address(_, command) => self.address(command),
            Output::Forward(ForwardCommand::Set { leave, .. }) => {
                self.forwards.insert(leave.address);
            }
            Output::Forward(ForwardCommand::Remove { address }) => {
                self.forwards.remove(address);
            }
            Output::Translate(TranslateCommand::Set {
                ifindex, address, ..
            }) => {
                self.translations.insert((*ifindex, *address));
            }
            Output::Translate(TranslateCommand::Remove { ifindex, address }) => {
                self.translations.remove(&(*ifindex, *address));
            }
            _ => {}
        }
    }

    fn gate(&mut self, command: &GateCommand) {
        match command {
            GateCommand::Record { ifindex, .. } => {
                self.gates.insert(*ifindex, Gate::Records);
            }
            GateCommand::Hold { ifindex } => {
                self.gates.insert(*ifindex, Gate::Holds);
            }
            GateCommand::Replay { ifindex, .. } | GateCommand::ReplayBlind { ifindex, .. } => {
                if let Some(gate) = self.gates.get_mut(ifindex).filter(|it| **it == Gate::Holds) {
                    *gate = Gate::Replays;
                }
            }
            GateCommand::Clear { ifindex } => {
                self.gates.remove(ifindex);
            }
            GateCommand::Cut { .. } => {}
        }
    }

    fn address(&mut self, command: &AddressCommand) {
        match command {
            AddressCommand::Watch { address } => {
                self.watched.insert(*address);
            }
            AddressCommand::Probe { address } => {
                assert!(self.watched.contains(address), "deaf probe");
            }
            AddressCommand::Forget { address, .. } => {
                self.watched.remove(address);
            }
            AddressCommand::Advertise { .. }
            | AddressCommand::Expect { .. }
            | AddressCommand::Replace { .. } => {}
        }
    }

    /// Removes a TAP with everything bound to the TAP.
    pub(in crate::proto) fn unplug(&mut self, ifindex: u32) {
        self.mdb.retain(|(port, _)| *port != ifindex);
        self.gates.remove(&ifindex);
        self.translations.retain(|(port, _)| *port != ifindex);
        self.listeners.retain(|key, _| key.ifindex != ifindex);
        self.sources
            .retain(|key, _| key.listener.ifindex != ifindex);
    }
}
