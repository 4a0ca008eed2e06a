//! One agent with a domain, for tests with individual messages.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use common::event::Change;
use common::maps::{FilterMode, Listener, ListenerKey, ManagedKey, Source, SourceKey};
use common::signal::{PORT, PeerMessage, Reason, VmMessage};

pub(in crate::proto) use super::pair::{
    BRIDGE, MAC, OTHER_MAC, OTHER_UUID, UUID, config, key, on_link, peer,
};
use crate::proto::*;

/// Ifindex of the port of the domain `viewer`.
pub(in crate::proto) const TAP: u32 = 10;

/// An agent and its clock.
pub(in crate::proto) struct Bench {
    pub(in crate::proto) agent: Agent,
    pub(in crate::proto) now: Timestamp,
}

impl Bench {
    /// Returns `vms1` without ports and domains.
    pub(in crate::proto) fn empty() -> Self {
        Self::with(config(0))
    }

    pub(in crate::proto) fn with(config: AgentConfig) -> Self {
        let mut bench = Self {
            agent: Agent::new(config, 1),
            now: Timestamp(1_000_000_000_000),
        };
        bench.hypervisor(HypervisorEvent::Connected);
        bench
    }

    /// Returns `vms1` with the running domain `viewer`.
    pub(in crate::proto) fn housing() -> Self {
        let mut bench = Self::empty();
        bench.house();
        bench
    }

    pub(in crate::proto) fn house(&mut self) {
        self.port(TAP, "vnet0");
        self.domain("vnet0", true);
    }

    pub(in crate::proto) fn port(&mut self, ifindex: u32, name: &str) {
        let port = Port {
            bridge: BRIDGE,
            ifindex,
            name: name.to_owned(),
            mac: [0xfe, MAC[1], MAC[2], MAC[3], MAC[4], MAC[5]],
        };
        self.agent.handle_port(self.now, PortEvent::Added(port));
    }

    pub(in crate::proto) fn unplug(&mut self, ifindex: u32) {
        let removed = PortEvent::Removed { ifindex };
        self.agent.handle_port(self.now, removed);
    }

    pub(in crate::proto) fn domain(&mut self, target_dev: &str, running: bool) {
        self.named_domain("viewer", target_dev, running);
    }

    pub(in crate::proto) fn named_domain(&mut self, name: &str, target_dev: &str, running: bool) {
        self.hypervisor(HypervisorEvent::Domain(Domain {
            uuid: UUID,
            name: name.to_owned(),
            running,
            interfaces: vec![DomainInterface {
                target_dev: target_dev.to_owned(),
                mac: MAC,
                vhost: false,
            }],
        }));
    }

    pub(in crate::proto) fn hypervisor(&mut self, event: HypervisorEvent) {
        self.agent.handle_hypervisor(self.now, event);
    }

    pub(in crate::proto) fn datapath(&mut self, event: DatapathEvent) {
        self.agent.handle_datapath(self.now, event);
    }

    pub(in crate::proto) fn peer(&mut self, event: PeerEvent) {
        self.agent.handle_peer(self.now, "vms2", event);
    }

    pub(in crate::proto) fn frame(&mut self, transaction: u64, message: impl Into<PeerMessage>) {
        self.peer(PeerEvent::Frame(message.into().encode(transaction).into()));
    }

    /// Sends a message as the VM behind [`TAP`].
    pub(in crate::proto) fn vm(&mut self, transaction: u64, message: impl Into<VmMessage>) {
        let bytes = message.into().encode(transaction);
        self.agent
            .handle_datagram(self.now, TAP, vm_address(), &bytes);
    }

    /// Lets time pass, and runs all due timers.
    pub(in crate::proto) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(due) = self.agent.poll_timeout().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.agent.handle_timeout(self.now);
        }
        self.now = end;
    }

    pub(in crate::proto) fn outputs(&mut self) -> Vec<Output> {
        std::iter::from_fn(|| self.agent.poll_output()).collect()
    }

    /// Returns the messages to the VM, with transactions; drops other outputs.
    pub(in crate::proto) fn told(&mut self) -> Vec<(u64, VmMessage)> {
        self.outputs()
            .into_iter()
            .filter_map(|output| match output {
                Output::Datagram { to, bytes } => {
                    let socket = vm_address();
                    assert_eq!(
                        to,
                        VmAddress {
                            bridge: BRIDGE,
                            socket
                        }
                    );
                    Some(VmMessage::decode(&bytes).unwrap())
                }
                _ => None,
            })
            .collect()
    }

    /// Returns the reason of the last abort to the VM.
    pub(in crate::proto) fn abort_reason(&mut self) -> String {
        self.abort().text
    }

    /// The abort that the VM was told last.
    pub(in crate::proto) fn abort(&mut self) -> Reason {
        match self.told().pop() {
            Some((_, VmMessage::MigrationAbort(abort))) => abort.0,
            other => panic!("no abort but {other:?}"),
        }
    }

    /// Delivers a Report of the VM behind a port.
    pub(in crate::proto) fn report(&mut self, ifindex: u32, key: ManagedKey, mode: FilterMode) {
        let event = DatapathEvent::Listener {
            change: Change::Updated,
            key: listener_key(ifindex, key),
            value: listener(self.now, mode),
        };
        self.datapath(event);
    }

    pub(in crate::proto) fn leave(&mut self, ifindex: u32, key: ManagedKey) {
        let event = DatapathEvent::Listener {
            change: Change::Removed,
            key: listener_key(ifindex, key),
            value: listener(self.now, FilterMode::Include),
        };
        self.datapath(event);
    }

    pub(in crate::proto) fn source(
        &mut self,
        ifindex: u32,
        key: ManagedKey,
        source: Ipv6Addr,
        generation: u32,
    ) {
        let event = DatapathEvent::Source {
            change: Change::Updated,
            key: SourceKey {
                listener: listener_key(ifindex, key),
                source: source.octets(),
            },
            value: Source {
                last_report_ns: self.now.0,
                generation,
                filter_mode: FilterMode::Include as u8,
                pad: [0; 3],
            },
        };
        self.datapath(event);
    }
}

pub(in crate::proto) fn vm_address() -> SocketAddrV6 {
    SocketAddrV6::new("fe80::1".parse().unwrap(), PORT, 0, 3)
}

pub(in crate::proto) fn listener_key(ifindex: u32, key: ManagedKey) -> ListenerKey {
    crate::proto::host::listeners::listener_key(ifindex, &key)
}

pub(in crate::proto) fn listener(at: Timestamp, mode: FilterMode) -> Listener {
    Listener {
        first_report_ns: at.0,
        last_report_ns: at.0,
        last_answer_ns: at.0,
        generation: 1,
        source_count: 0,
        filter_mode: mode as u8,
        mld_version: 2,
        guest_mac: MAC,
    }
}
