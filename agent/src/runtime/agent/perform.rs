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
    AddressEvent, CommandReply, DatapathEvent, ForwardCommand, Leave, LinkAddress, MdbEntry,
    Membership, Output, TranslateCommand,
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
                let Some(bridge) = self.bridges.of(to.bridge) else {
                    return Ok(());
                };
                let to = to.socket;
                if let Err(error) = bridge.send(to, &bytes).await {
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
            Output::Leave(key) => {
                if let Some(bridge) = self.bridges.of(key.bridge) {
                    bridge.leave(&key);
                }
            }
            Output::Prune(key) => {
                if let Some(bridge) = self.bridges.of(key.bridge)
                    && let Err(error) = bridge.prune(&key)
                {
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
            Output::Address(number, command) => {
                if let Some(bridge) = self.bridges.of(number) {
                    bridge.handle_address(&command);
                }
            }
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
                let Some(value) = self.leaving(&leave) else {
                    return;
                };
                let key = forward_key(leave.address);
                self.datapath.forward_set(&key, &value)
            }
            ForwardCommand::Set {
                leave,
                until,
                unread_until,
            } => {
                let Some(value) = self.leaving(&leave) else {
                    return;
                };
                let value = Forward {
                    until_ns: until.0,
                    unread_until_ns: unread_until.0,
                    ..value
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
                    let address = LinkAddress {
                        bridge: key.bridge,
                        address: key.address.into(),
                    };
                    self.forwarded(address, Some(value));
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

    /// Returns the entry of `FORWARDS` before the VM stops; `None` if the bridge is gone.
    fn leaving(&mut self, leave: &Leave) -> Option<Forward> {
        let LinkAddress { bridge, address } = leave.address;
        let (from, destination) = (address.octets(), leave.to.octets());
        Some(Forward {
            destination,
            difference: common::forward::difference(&from, &destination),
            bridge: self.bridges.of(bridge)?.ifindex(),
            ifindex: leave.ifindex,
            domain_uuid: leave.uuid.0,
            ..Forward::default()
        })
    }

    fn forwarded(&mut self, address: LinkAddress, value: Option<Forward>) {
        let LinkAddress { bridge, address } = address;
        // For an address that the VM still has, nothing was forwarded.
        if let Some(value) = value.filter(|value| value.until_ns != 0) {
            let event = AddressEvent::Forwarded {
                address,
                packets: value.packets,
                bytes: value.bytes,
                dropped: value.dropped,
            };
            self.proto.handle_address(now(), bridge, event);
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
                let (from, source) = (address.address.octets(), to.octets());
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
        self.proto.handle_address(now(), key.bridge, event);
    }

    fn join(&mut self, membership: &Membership) {
        if let Some(bridge) = self.bridges.of(membership.key.bridge)
            && let Err(error) = bridge.join(membership)
        {
            self.failed(membership.key, &error);
        }
    }

    fn perform_batch(&mut self, batch: Batch) -> Result<(), RuntimeError> {
        if let Some(number) = batch
            .add
            .first()
            .map(|(_, membership)| membership.key.bridge)
            && let Some(bridge) = self.bridges.of(number)
        {
            let entries: Vec<_> = batch
                .add
                .iter()
                .map(|(ifindex, membership)| (*ifindex, membership))
                .collect();
            match bridge.mdb_add(&entries) {
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
        if let Some(number) = batch.delete.first().map(|entry| entry.key.bridge)
            && let Some(bridge) = self.bridges.of(number)
            && let Err(error) = bridge.mdb_delete(&batch.delete)
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

fn translation_key(ifindex: u32, address: LinkAddress) -> TranslationKey {
    TranslationKey {
        address: address.address.octets(),
        ifindex,
        vlan: 0,
        bridge: address.bridge,
    }
}

fn forward_key(address: LinkAddress) -> ForwardKey {
    ForwardKey {
        address: address.address.octets(),
        vlan: 0,
        bridge: address.bridge,
    }
}

/// Neighbouring outputs of one kind, which the kernel takes together. MDB entries of a batch belong
/// to one bridge.
#[derive(Default)]
struct Batch {
    add: Vec<(u32, Membership)>,
    delete: Vec<MdbEntry>,
    expire: Vec<(ListenerKey, u64)>,
}

impl Batch {
    /// Returns true if the batch is empty or holds outputs of the same kind and bridge. A batch
    /// holds only one kind, so the outputs keep their order.
    fn takes(&self, output: &Output) -> bool {
        match output {
            Output::MdbAdd { membership, .. } => {
                let number = membership.key.bridge;
                let first = self.add.first();
                let is_same = first.is_none_or(|(_, first)| first.key.bridge == number);
                is_same && self.delete.is_empty() && self.expire.is_empty()
            }
            Output::MdbDelete(entry) => {
                let first = self.delete.first();
                let is_same = first.is_none_or(|first| first.key.bridge == entry.key.bridge);
                is_same && self.add.is_empty() && self.expire.is_empty()
            }
            Output::ExpireListener { .. } => self.add.is_empty() && self.delete.is_empty(),
            _ => false,
        }
    }
}
