//! Simulated kernels: the effect of outputs, and the kernels' events.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::event::Change;
use common::maps::{
    Forward, ForwardKey, Listener, ManagedKey, StreamKey, StreamUsage, Translation, TranslationKey,
};
use common::signal::{CutBasis, NicCut};

use super::pair::*;
use crate::proto::handover::HoldReport;
use crate::proto::*;

impl Pair {
    pub(super) fn whims(&mut self) -> Vec<Duration> {
        let copies = 1 + usize::from(self.setup.dice.roll(100) < self.setup.duplication);
        (0..copies)
            .filter_map(|_| {
                let dice = &mut self.setup.dice;
                if dice.roll(100) < self.setup.loss {
                    return None;
                }
                let late = dice.roll(100) < self.setup.reordering;
                Some(ms(if late { 1 + dice.roll(300) } else { 1 }))
            })
            .collect()
    }

    pub(super) fn output(&mut self, host: usize, output: Output) {
        let kernel = &mut self.hosts[host].kernel;
        match output {
            Output::Datagram { bytes, .. } => {
                for delay in self.whims() {
                    let bytes = bytes.clone();
                    self.after(delay, Event::ToVm { host, bytes });
                }
            }
            Output::Connect { .. } => self.after(ms(5), Event::Connected { by: host }),
            Output::Frame { bytes, .. } => {
                let (to, epoch) = (1 - host, self.link_epoch);
                self.after(ms(2), Event::Frame { to, epoch, bytes });
            }
            Output::Join(membership) => {
                let key = membership.key;
                kernel.joins.insert(key, membership);
                if let Some(delay) = self.setup.tree {
                    self.after(delay, Event::Packet { host, key });
                }
            }
            Output::Leave(key) => {
                kernel.joins.remove(&key);
                let now = self.now;
                self.left_at.insert(key, now);
            }
            Output::Prune(key) => kernel.pruned.push(key),
            Output::Manage { key, since, .. } => {
                kernel.managed.insert(key, since);
                if let Some(delay) = self.setup.tree {
                    self.after(delay, Event::Packet { host, key });
                }
            }
            Output::Unmanage(key) => {
                kernel.managed.remove(&key);
            }
            Output::MdbAdd {
                ifindex,
                membership,
            } => {
                assert!(kernel.ports.contains_key(&ifindex), "entry for no port");
                kernel.mdb.insert((ifindex, membership.key));
            }
            Output::MdbDelete(entry) => {
                kernel.mdb.remove(&(entry.ifindex, entry.key));
            }
            Output::ExpireListener {
                key,
                last_report_ns,
            } => {
                let old = |value: &Listener| value.last_report_ns <= last_report_ns;
                if kernel.listeners.get(&key).is_some_and(old) {
                    kernel.listeners.remove(&key);
                }
            }
            Output::ExpireSource { .. }
            | Output::ReadUsage
            | Output::RelayFlowSet { .. }
            | Output::RelayFlowRemove(_) => {}
            Output::ReadListeners { listeners, .. } => {
                for key in listeners {
                    let found = kernel.listeners.get(&key).copied();
                    let event = DatapathEvent::Listener {
                        change: found.map_or(Change::Removed, |_| Change::Updated),
                        key,
                        value: found.unwrap_or(Listener::NONE),
                    };
                    self.sequence += 1;
                    let at = (self.now + ms(1), self.sequence);
                    self.queue.insert(at, Event::Datapath { host, event });
                }
            }
            Output::ReadStreams { token, keys } => {
                let streams = keys
                    .into_iter()
                    .filter(|_| host == self.vm_host)
                    .map(|key| self.stream(&key))
                    .collect();
                let event = DatapathEvent::Streams { token, streams };
                self.after(ms(1), Event::Datapath { host, event });
            }
            Output::StartMigration {
                uuid, connect_uri, ..
            } => {
                assert_eq!((host, uuid), (0, UUID));
                assert_eq!(connect_uri, "qemu+tcp://vms2/system");
                self.starts += 1;
                self.begin_migration();
            }
            Output::FollowMigration { uuid } => {
                assert_eq!((host, uuid), (0, UUID));
                let until = self.now + ms(30_000);
                self.after(ms(1), Event::FollowMigration { until });
            }
            Output::Gate(command) => self.gate(host, command),
            Output::Address(bridge, command) => {
                assert_eq!(bridge, BRIDGE);
                self.address(host, command);
            }
            Output::Forward(command) => self.forward(host, command),
            Output::Translate(command) => self.translate(host, command),
            Output::AbortMigration { .. } => self.fail_migration(),
            Output::Reply { reply, .. } => {
                self.replies.push(reply);
                if self.setup.by_hook {
                    self.after(ms(1), Event::Hooked);
                }
            }
        }
    }

    /// Plays the link's other nodes and the VM.
    fn address(&mut self, host: usize, command: AddressCommand) {
        let kernel = &mut self.hosts[host].kernel;
        match command {
            AddressCommand::Watch { address } => {
                kernel.watched.insert(address);
            }
            AddressCommand::Forget { address, .. } => {
                kernel.watched.remove(&address);
            }
            AddressCommand::Probe { address } => {
                assert!(kernel.watched.contains(&address), "deaf probe");
                if let Some(delay) = self.setup.taken.filter(|_| host == 1) {
                    let event = AddressEvent::Heard {
                        address,
                        said: Said::Has,
                        by: OTHER_MAC,
                    };
                    self.after(delay, Event::Address { host, event });
                }
                if host == self.vm_host && address == MOAS[0] && !self.vm_paused {
                    let event = AddressEvent::Heard {
                        address,
                        said: Said::Has,
                        by: MAC,
                    };
                    self.after(ms(1), Event::Address { host, event });
                }
            }
            AddressCommand::Expect { ifindex, .. } => {
                assert!(kernel.ports.contains_key(&ifindex), "no TAP to expect by");
            }
            AddressCommand::Advertise { .. } | AddressCommand::Replace { .. } => {}
        }
    }

    fn forward(&mut self, host: usize, command: ForwardCommand) {
        let kernel = &mut self.hosts[host].kernel;
        match command {
            ForwardCommand::Expect(leave) => {
                let (key, value) = entry(&leave);
                kernel.forwards.insert(key, value);
            }
            ForwardCommand::Set { leave, until, .. } => {
                let (key, value) = entry(&leave);
                let value = Forward {
                    until_ns: until.0,
                    packets: 7,
                    ..value
                };
                kernel.forwards.insert(key, value);
            }
            ForwardCommand::Remove { address } => {
                let LinkAddress { bridge, address } = address;
                let of = |key: &ForwardKey, _: &mut Forward| {
                    (key.bridge, key.address) == (bridge, address.octets())
                };
                let removed: Vec<_> = kernel.forwards.extract_if(.., of).collect();
                for (_, value) in removed.into_iter().filter(|it| it.1.until_ns != 0) {
                    let event = AddressEvent::Forwarded {
                        address,
                        packets: value.packets,
                        bytes: 0,
                        dropped: 0,
                    };
                    self.after(ms(0), Event::Address { host, event });
                }
            }
            ForwardCommand::Resolve { .. }
            | ForwardCommand::Release { .. }
            | ForwardCommand::Read => {}
        }
    }

    fn translate(&mut self, host: usize, command: TranslateCommand) {
        let kernel = &mut self.hosts[host].kernel;
        match command {
            TranslateCommand::Set {
                ifindex,
                address,
                to,
                until,
                uuid,
            } => {
                assert!(
                    kernel.ports.contains_key(&ifindex),
                    "no TAP to translate at"
                );
                let key = TranslationKey {
                    address: address.address.octets(),
                    ifindex,
                    vlan: 0,
                    bridge: address.bridge,
                };
                let value = Translation {
                    until_ns: until.0,
                    packets: 5,
                    source: to.octets(),
                    domain_uuid: uuid.0,
                    ..Translation::default()
                };
                kernel.translations.insert(key, value);
            }
            TranslateCommand::Remove { ifindex, address } => {
                let LinkAddress { bridge, address } = address;
                let of = |key: &TranslationKey, _: &mut Translation| {
                    (key.ifindex, key.bridge, key.address) == (ifindex, bridge, address.octets())
                };
                let removed: Vec<_> = kernel.translations.extract_if(.., of).collect();
                for (_, value) in removed {
                    let event = AddressEvent::Translated {
                        ifindex,
                        address,
                        packets: value.packets,
                        bytes: 0,
                        dropped: 0,
                    };
                    self.after(ms(0), Event::Address { host, event });
                }
            }
            TranslateCommand::Read => {}
        }
    }

    /// Plays the gates' thread.
    fn gate(&mut self, host: usize, command: GateCommand) {
        let kernel = &mut self.hosts[host].kernel;
        let later = match command {
            GateCommand::Record { ifindex, .. } => {
                kernel.gates.insert(ifindex, SimGate::Records);
                return;
            }
            GateCommand::Cut { ifindex, .. } => {
                if kernel.gates.get(&ifindex) != Some(&SimGate::Records) {
                    return;
                }
                let cut = NicCut {
                    mac: MAC.into(),
                    basis: CutBasis::Count,
                    flows: vec![],
                    tap_full: None,
                };
                (ms(10), GateEvent::Cut { ifindex, cut })
            }
            GateCommand::Hold { ifindex } => {
                assert!(kernel.ports.contains_key(&ifindex), "gate of no port");
                kernel.gates.insert(ifindex, SimGate::Holds);
                return;
            }
            GateCommand::Replay { ifindex, .. } | GateCommand::ReplayBlind { ifindex, .. } => {
                if kernel.gates.get(&ifindex) != Some(&SimGate::Holds) {
                    return;
                }
                kernel.gates.insert(ifindex, SimGate::Replays);
                let report = HoldReport::default();
                (ms(20), GateEvent::Opened { ifindex, report })
            }
            GateCommand::Clear { ifindex } => {
                kernel.gates.remove(&ifindex);
                return;
            }
        };
        let (delay, event) = later;
        self.after(delay, Event::Gate { host, event });
    }

    pub(super) fn stream(&self, key: &ManagedKey) -> (StreamKey, Stream) {
        let flow = StreamKey {
            multicast_address: key.multicast_address,
            source: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets(),
            source_port: 5004,
            destination_port: 5004,
            vlan: 0,
            bridge: BRIDGE,
        };
        let stream = Stream {
            native: StreamUsage {
                packets: 1000,
                bytes: 1_450_000,
                last_ns: self.now.0,
                interarrival_ns: 580_000,
                ..StreamUsage::default()
            },
            ..Stream::default()
        };
        (flow, stream)
    }
}

/// Returns the entry of `FORWARDS` for an address that the VM still has.
fn entry(leave: &Leave) -> (ForwardKey, Forward) {
    let key = ForwardKey {
        address: leave.address.address.octets(),
        vlan: 0,
        bridge: leave.address.bridge,
    };
    let value = Forward {
        destination: leave.to.octets(),
        ifindex: leave.ifindex,
        domain_uuid: leave.uuid.0,
        ..Forward::default()
    };
    (key, value)
}
