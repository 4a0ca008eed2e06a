//! Performs the protocol's outputs.

use std::net::Ipv6Addr;

use common::event::Change;
use common::maps::{
    Forward, ForwardKey, Listener, ListenerKey, ManagedKey, Source, SourceKey, Translation,
    TranslationKey,
};

use super::RuntimeError;
use super::event_loop::EventLoop;
use crate::clock::now;
use crate::control::Reply;
use crate::control::report::LinkState;
use crate::hypervisor::{Hypervisor as _, MigrateRequest};
use crate::proto::{
    AddressEvent, CommandReply, DatapathEvent, ForwardCommand, Leave, MdbEntry, Membership, Output,
    TranslateCommand,
};

impl EventLoop {
    /// Performs outputs until the protocol has none left. Passes neighbouring outputs of one kind
    /// to the kernel together, where the kernel takes many at once.
    pub(super) async fn perform_outputs(&mut self) -> Result<(), RuntimeError> {
        let mut batch = Batch::default();
        loop {
            let output = self.proto.poll_output();
            if !output.as_ref().is_some_and(|output| batch.takes(output)) {
                self.perform_batch(std::mem::take(&mut batch))?;
            }
            match output {
                None => return Ok(()),
                Some(Output::MdbAdd {
                    ifindex,
                    membership,
                }) => {
                    batch.add.push((ifindex, membership));
                }
                Some(Output::MdbDelete(entry)) => batch.delete.push(entry),
                Some(Output::ExpireListener {
                    key,
                    last_report_ns,
                }) => {
                    batch.expire.push((key, last_report_ns));
                }
                Some(output) => self.perform(output).await?,
            }
        }
    }

    async fn perform(&mut self, output: Output) -> Result<(), RuntimeError> {
        match output {
            Output::Datagram { to, bytes } => {
                if let Err(error) = self.vm_socket.send(to, &bytes).await {
                    tracing::debug!(%to, %error, "Cannot answer a VM; it will ask again");
                }
            }
            Output::Connect { peer } => {
                if !self.proto.view().is_relay(&peer) {
                    let state = (LinkState::Connecting, None);
                    self.peer_states.insert(peer.clone(), state);
                }
                self.peers.connect(&peer);
            }
            Output::Frame { peer, bytes } => self.peers.send(&peer, bytes),
            Output::Join(membership) => self.join(&membership),
            Output::Leave(key) => self.memberships.leave(&key),
            Output::Prune(key) => {
                if let Err(error) = self.memberships.prune(&key) {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "Cannot prune; the stream goes on until the querier asks again"
                    );
                }
            }
            Output::Manage {
                key,
                since,
                origins,
            } => {
                if key.vlan == 0 {
                    self.registrar.search(key.multicast_address, &self.peers);
                }
                if let Err(error) = self.datapath.manage(&key, since, origins) {
                    self.failed(key, &error);
                }
            }
            Output::Unmanage(key) => self.datapath.unmanage(&key)?,
            Output::RelayFlowSet { key, value } => {
                if let Err(error) = self.datapath.relay_flow_set(&key, &value) {
                    tracing::warn!(
                        multicast_address = %Ipv6Addr::from(value.stream.multicast_address),
                        error = &error as &dyn std::error::Error,
                        "A relayed flow cannot be restored"
                    );
                }
            }
            Output::RelayFlowRemove(key) => {
                self.datapath.relay_flow_remove(&key)?;
            }
            Output::ExpireSource {
                key,
                last_report_ns,
            } => {
                self.datapath.expire_source(&key, last_report_ns)?;
            }
            Output::ReadListeners { listeners, sources } => self.read(&listeners, &sources)?,
            Output::ReadStreams { token, keys } => self.stream_reads.ask(token, keys),
            Output::ReadUsage => {
                for event in self.datapath.usage_events()? {
                    self.proto.handle_datapath(now(), event);
                }
            }
            Output::Gate(command) => self.gates.perform(command),
            Output::Address(command) => self.link_addresses.perform(&command),
            Output::Forward(command) => self.forward(&command),
            Output::Translate(command) => self.translate(command),
            Output::StartMigration {
                uuid,
                connect_uri,
                migrate_uri,
                tls,
            } => {
                self.hypervisor.migrate(MigrateRequest {
                    uuid,
                    connect_uri,
                    migrate_uri,
                    tls,
                });
            }
            Output::FollowMigration { uuid } => self.hypervisor.follow(uuid),
            Output::AbortMigration { uuid } => self.hypervisor.abort(uuid),
            Output::Reply { command, reply } => self.reply(command, reply),
            // The batch takes these outputs.
            Output::MdbAdd { .. } | Output::MdbDelete(_) | Output::ExpireListener { .. } => {}
        }
        Ok(())
    }

    /// Starts or stops forwarding. A failure is only logged: it ends no migration.
    fn forward(&mut self, command: &ForwardCommand) {
        let done = match *command {
            ForwardCommand::Resolve { to } => {
                match self.neighbours.resolve(to) {
                    Ok(known) => tracing::debug!(%to, known, "Next hop is looked up"),
                    Err(error) => tracing::debug!(%to, %error, "No way to a VM that has left"),
                }
                Ok(())
            }
            ForwardCommand::Release { to } => {
                self.neighbours.forget(to);
                Ok(())
            }
            ForwardCommand::Expect(leave) => {
                let value = self.leaving(&leave);
                let key = forward_key(leave.address);
                self.datapath.forward_set(&key, &value)
            }
            ForwardCommand::Set {
                leave,
                until,
                unread_until,
            } => {
                let value = Forward {
                    until_ns: until.0,
                    unread_until_ns: unread_until.0,
                    ..self.leaving(&leave)
                };
                let key = forward_key(leave.address);
                self.datapath.forward_set(&key, &value)
            }
            ForwardCommand::Remove { address } => self
                .datapath
                .forward_remove(&forward_key(address))
                .map(|removed| self.forwarded(address, removed)),
            ForwardCommand::Read => self.datapath.forwards().map(|forwards| {
                for (key, value) in forwards {
                    self.forwarded(key.address.into(), Some(value));
                }
            }),
        };
        if let Err(error) = done {
            tracing::warn!(
                ?command,
                error = &error as &dyn std::error::Error,
                "Packets for a VM that has left are not sent on as they should be"
            );
        }
    }

    fn leaving(&self, leave: &Leave) -> Forward {
        let (from, destination) = (leave.address.octets(), leave.to.octets());
        Forward {
            destination,
            difference: common::forward::difference(&from, &destination),
            bridge: self.links.bridge_ifindex(),
            ifindex: leave.ifindex,
            domain_uuid: leave.uuid.0,
            ..Forward::default()
        }
    }

    fn forwarded(&mut self, address: Ipv6Addr, value: Option<Forward>) {
        // For an address that the VM still has, nothing was forwarded.
        if let Some(value) = value.filter(|value| value.until_ns != 0) {
            let event = AddressEvent::Forwarded {
                address,
                packets: value.packets,
                bytes: value.bytes,
                dropped: value.dropped,
            };
            self.proto.handle_address(now(), event);
        }
    }

    /// Starts or stops translation. A failure is only logged: it ends no migration.
    fn translate(&mut self, command: TranslateCommand) {
        let done = match command {
            TranslateCommand::Set {
                ifindex,
                address,
                to,
                until,
                uuid,
            } => {
                let (from, source) = (address.octets(), to.octets());
                let value = Translation {
                    until_ns: until.0,
                    source,
                    difference: common::forward::difference(&from, &source),
                    domain_uuid: uuid.0,
                    ..Translation::default()
                };
                let key = translation_key(ifindex, address);
                self.datapath.translation_set(&key, &value)
            }
            TranslateCommand::Remove { ifindex, address } => {
                let key = translation_key(ifindex, address);
                let removed = self.datapath.translation_remove(&key);
                removed.map(|removed| {
                    if let Some(value) = removed {
                        self.translated(&key, &value);
                    }
                })
            }
            TranslateCommand::Read => self.datapath.translations().map(|translations| {
                for (key, value) in translations {
                    self.translated(&key, &value);
                }
            }),
        };
        if let Err(error) = done {
            tracing::warn!(
                ?command,
                error = &error as &dyn std::error::Error,
                "Packets of a VM that has arrived are not translated as they should be"
            );
        }
    }

    fn translated(&mut self, key: &TranslationKey, value: &Translation) {
        let event = AddressEvent::Translated {
            ifindex: key.ifindex,
            address: key.address.into(),
            packets: value.packets,
            bytes: value.bytes,
            dropped: value.dropped,
        };
        self.proto.handle_address(now(), event);
    }

    fn join(&mut self, membership: &Membership) {
        let vlan = membership.key.vlan;
        let bridge = &self.config.agent.bridge;
        if vlan != 0
            && let Ok(ifindex) = nix::net::if_::if_nametoindex(format!("{bridge}.{vlan}").as_str())
        {
            self.memberships.set_vlan_interface(vlan, ifindex);
        }
        if let Err(error) = self.memberships.join(membership) {
            self.failed(membership.key, &error);
        }
    }

    fn perform_batch(&mut self, batch: Batch) -> Result<(), RuntimeError> {
        if !batch.add.is_empty() {
            let entries: Vec<_> = batch
                .add
                .iter()
                .map(|(ifindex, membership)| (*ifindex, membership))
                .collect();
            match self.mdb.add(&entries) {
                Ok(outcomes) => {
                    for ((_, membership), outcome) in batch.add.iter().zip(outcomes) {
                        if let Err(error) = outcome {
                            self.failed(membership.key, &error);
                        }
                    }
                }
                Err(error) => {
                    for (_, membership) in &batch.add {
                        self.failed(membership.key, &error);
                    }
                }
            }
        }
        if !batch.delete.is_empty()
            && let Err(error) = self.mdb.delete(&batch.delete)
        {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "Cannot remove MDB entries; they expire by themselves"
            );
        }
        if !batch.expire.is_empty() {
            self.datapath.expire(&batch.expire)?;
        }
        Ok(())
    }

    fn failed(&mut self, key: ManagedKey, error: &(dyn std::error::Error + 'static)) {
        tracing::warn!(error, "An address cannot be served");
        let reason = error.to_string();
        self.proto
            .handle_datapath(now(), DatapathEvent::Failed { key, reason });
    }

    /// Reads entries again for the protocol.
    fn read(
        &mut self,
        listeners: &[ListenerKey],
        sources: &[SourceKey],
    ) -> Result<(), RuntimeError> {
        for key in listeners {
            let found = self.datapath.listener(key)?;
            let event = DatapathEvent::Listener {
                change: if found.is_some() {
                    Change::Updated
                } else {
                    Change::Removed
                },
                key: *key,
                value: found.unwrap_or(Listener::NONE),
            };
            self.proto.handle_datapath(now(), event);
        }
        for key in sources {
            let found = self.datapath.source(key)?;
            let event = DatapathEvent::Source {
                change: if found.is_some() {
                    Change::Updated
                } else {
                    Change::Removed
                },
                key: *key,
                value: found.unwrap_or(Source::NONE),
            };
            self.proto.handle_datapath(now(), event);
        }
        Ok(())
    }

    fn reply(&mut self, command: u64, reply: CommandReply) {
        let last = !matches!(reply, CommandReply::Progress { .. });
        // The command continues even if its operator has left.
        if let Some(replies) = self.commands.get(&command) {
            let _ = replies.send(Reply::from(reply));
        }
        if last {
            self.commands.remove(&command);
        }
    }
}

fn translation_key(ifindex: u32, address: Ipv6Addr) -> TranslationKey {
    TranslationKey {
        address: address.octets(),
        ifindex,
        vlan: 0,
        pad: 0,
    }
}

fn forward_key(address: Ipv6Addr) -> ForwardKey {
    ForwardKey {
        address: address.octets(),
        vlan: 0,
        pad: 0,
    }
}

/// Neighbouring outputs of one kind, which the kernel takes together.
#[derive(Default)]
struct Batch {
    add: Vec<(u32, Membership)>,
    delete: Vec<MdbEntry>,
    expire: Vec<(ListenerKey, u64)>,
}

impl Batch {
    /// Returns true if the batch is empty or holds outputs of the same kind. A batch holds only one
    /// kind, so the outputs keep their order.
    fn takes(&self, output: &Output) -> bool {
        match output {
            Output::MdbAdd { .. } => self.delete.is_empty() && self.expire.is_empty(),
            Output::MdbDelete(_) => self.add.is_empty() && self.expire.is_empty(),
            Output::ExpireListener { .. } => self.add.is_empty() && self.delete.is_empty(),
            _ => false,
        }
    }
}
