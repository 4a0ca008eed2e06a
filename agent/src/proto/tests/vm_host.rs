//! The simulated hypervisors and the VM.

use std::collections::BTreeSet;

use common::event::Change;
use common::maps::{FilterMode, Listener, ListenerKey, ManagedKey};
use common::signal::{MigrationAbort, MigrationReady, MigrationRequest, Phase, VmMessage};

use super::pair::*;
use crate::proto::*;

impl Pair {
    pub(super) fn boot(&mut self, host: usize) {
        // The lease of an earlier agent's gates opens them.
        self.hosts[host].kernel.gates.clear();
        let kernel = &self.hosts[host].kernel;
        let managed = kernel
            .managed
            .iter()
            .map(|(key, since)| {
                let value =
                    common::maps::Managed::new(since.0, common::maps::Origins::Native, u16::MAX);
                (*key, value)
            })
            .collect();
        let ports: Vec<_> = kernel.ports.values().cloned().collect();
        let domains: Vec<_> = kernel.domains.values().cloned().collect();
        let snapshot = DatapathEvent::Snapshot {
            listeners: kernel.listeners.iter().map(|(k, v)| (*k, *v)).collect(),
            sources: vec![],
            queriers: vec![],
        };
        for domain in domains {
            self.hypervisor(host, HypervisorEvent::Domain(domain));
        }
        if host == 0 && self.migrating && self.hosts[0].kernel.domains.contains_key(&UUID) {
            self.hypervisor(host, HypervisorEvent::Departing { uuid: UUID });
        }
        self.hypervisor(host, HypervisorEvent::Connected);
        self.input(host, |agent, now| {
            agent.handle_pinned(now, managed, Vec::new());
        });
        let forwards = self.hosts[host].kernel.forwards.clone();
        self.input(host, |agent, now| {
            agent.handle_forwards(now, forwards.into_iter().collect());
        });
        let translations = self.hosts[host].kernel.translations.clone();
        self.input(host, |agent, now| {
            agent.handle_translations(now, translations.into_iter().collect());
        });
        self.input(host, |agent, now| agent.handle_datapath(now, snapshot));
        self.input(host, Agent::handle_adopted);
        for port in ports {
            self.input(host, |agent, now| {
                agent.handle_port(now, PortEvent::Added(port));
            });
        }
    }

    pub(super) fn add_domain(&mut self, host: usize, running: bool) {
        let ifindex = self.hosts[host].next_ifindex;
        self.hosts[host].next_ifindex += 2;
        let name = format!("vnet{ifindex}");
        let domain = domain(running, &name);
        let kernel = &mut self.hosts[host].kernel;
        kernel.domains.insert(UUID, domain.clone());
        for (ifindex, name, last) in [(ifindex, name.clone(), 1), (ifindex + 1, idle(&name), 2)] {
            let port = Port {
                bridge: BRIDGE,
                ifindex,
                name,
                mac: [0xfe, 0x54, 0, 0, 0, last],
            };
            let kernel = &mut self.hosts[host].kernel;
            kernel.ports.insert(ifindex, port.clone());
            self.input(host, |agent, now| {
                agent.handle_port(now, PortEvent::Added(port));
            });
        }
        self.hypervisor(host, HypervisorEvent::Domain(domain));
    }

    pub(super) fn remove_domain(&mut self, host: usize) {
        let kernel = &mut self.hosts[host].kernel;
        kernel.domains.clear();
        kernel.listeners.clear();
        kernel.mdb.clear();
        kernel.gates.clear();
        let ports = std::mem::take(&mut kernel.ports);
        for ifindex in ports.into_keys() {
            self.input(host, |agent, now| {
                agent.handle_port(now, PortEvent::Removed { ifindex });
            });
        }
        self.hypervisor(host, HypervisorEvent::Gone(UUID));
    }

    pub(super) fn hypervisor(&mut self, host: usize, event: HypervisorEvent) {
        self.input(host, |agent, now| agent.handle_hypervisor(now, event));
    }

    pub(super) fn report(&mut self, host: usize, key: ManagedKey, at: Timestamp) {
        let Some(ifindex) = self.hosts[host].kernel.ports.keys().next().copied() else {
            return;
        };
        let listener = ListenerKey {
            ifindex,
            vlan: 0,
            bridge: BRIDGE,
            multicast_address: key.multicast_address,
        };
        let kernel = &mut self.hosts[host].kernel;
        let known = kernel.listeners.get(&listener).copied();
        let value = Listener {
            first_report_ns: known.map_or(at.0, |known| known.first_report_ns),
            last_report_ns: at.0,
            last_answer_ns: at.0,
            generation: 1,
            source_count: 0,
            filter_mode: FilterMode::Exclude as u8,
            mld_version: 2,
            guest_mac: MAC,
        };
        kernel.listeners.insert(listener, value);
        if known.is_none() || self.setup.refresh_events {
            let event = DatapathEvent::Listener {
                change: Change::Updated,
                key: listener,
                value,
            };
            self.input(host, |agent, now| agent.handle_datapath(now, event));
        }
    }

    /// Lets libvirt start the domain's migration.
    pub(super) fn begin_migration(&mut self) {
        self.migrating = true;
        self.migration_epoch += 1;
        for (step, at) in [20, 100, 200, 300, 400, 500].into_iter().enumerate() {
            let epoch = self.migration_epoch;
            self.after(ms(at), Event::Migration { epoch, step });
        }
    }

    /// Lets the source host's hypervisor look for a migration to follow.
    pub(super) fn follow(&mut self, until: Timestamp) {
        let uuid = UUID;
        if self.migrating && self.vm_host == 0 {
            self.hypervisor(0, HypervisorEvent::Departing { uuid });
        } else if self.now >= until || self.vm_host == 1 {
            let result = Err("nobody has asked libvirt to move it".to_owned());
            self.hypervisor(0, HypervisorEvent::MigrationEnded { uuid, result });
        } else {
            self.after(ms(100), Event::FollowMigration { until });
        }
    }

    pub(super) fn migrate(&mut self, step: usize) {
        let uuid = UUID;
        let at = self.now;
        match step {
            0 => self.add_domain(1, false),
            1 | 2 => {
                let stats = JobStats {
                    processed_bytes: 1000 * step as u64,
                    total_bytes: 4000,
                    iteration: 1,
                    downtime: None,
                };
                self.hypervisor(0, HypervisorEvent::Progress { uuid, stats });
            }
            3 => {
                self.vm_paused = true;
                self.hypervisor(0, HypervisorEvent::Suspended { uuid, at });
            }
            4 => {
                self.vm_paused = false;
                self.vm_host = 1;
                if let Some(domain) = self.hosts[1].kernel.domains.get_mut(&uuid) {
                    domain.running = true;
                }
                let migrated = true;
                self.hypervisor(1, HypervisorEvent::Resumed { uuid, migrated, at });
                let spoke = AddressEvent::Spoke { address: MOAS[1] };
                self.after(
                    ms(40),
                    Event::Address {
                        host: 1,
                        event: spoke,
                    },
                );
                // The NIC announces itself.
                self.after(ms(50), Event::VmReport { answer: false });
            }
            _ => {
                self.migrating = false;
                let stats = JobStats {
                    processed_bytes: 4000,
                    total_bytes: 4000,
                    iteration: 1,
                    downtime: Some(ms(100)),
                };
                self.remove_domain(0);
                let result = Ok(stats);
                self.hypervisor(0, HypervisorEvent::MigrationEnded { uuid, result });
            }
        }
    }

    pub(super) fn vm_speaks(&mut self) {
        let message = match self.vm {
            VmState::Over(_) => return,
            VmState::Requesting => VmMessage::from(MigrationRequest {
                destination: "vms2".to_owned(),
                domain: None,
            }),
            VmState::Waiting => MigrationReady {
                address: Some(MOAS[1].octets().into()),
                mac: Some(IDLE_MAC.into()),
                forward: vec![MOAS[0].octets().into()],
                forward_s: 10,
                translate: true,
            }
            .into(),
        };
        if !self.vm_paused {
            let bytes = message.encode(TRANSACTION);
            let host = self.vm_host;
            for delay in self.whims() {
                let bytes = bytes.clone();
                self.after(delay, Event::Datagram { host, bytes });
            }
        }
        self.after(ms(200), Event::VmTimer);
    }

    pub(super) fn vm_hears(&mut self, bytes: &[u8]) {
        let (transaction, message) = VmMessage::decode(bytes).unwrap();
        if transaction != TRANSACTION || matches!(self.vm, VmState::Over(_)) {
            return;
        }
        match message {
            VmMessage::MigrationResponse(_) if self.vm == VmState::Requesting => {
                self.vm = VmState::Waiting;
            }
            VmMessage::MigrationProgress(progress) if progress.phase == Phase::Completed => {
                assert_eq!(self.vm_host, 1, "completed while the VM is at the source");
                self.vm = VmState::Over(Ok(()));
            }
            VmMessage::MigrationAbort(MigrationAbort(reason)) => {
                self.vm = VmState::Over(Err(reason.text));
            }
            _ => {}
        }
    }

    /// Checks that the VM runs on one host, and that no unneeded state is left.
    pub(super) fn assert_clean(&self, context: &str) {
        assert!(
            !self.vm_paused && !self.migrating,
            "{context}: still moving"
        );
        for (number, host) in self.hosts.iter().enumerate() {
            let kernel = &host.kernel;
            let runs = kernel.domains.values().filter(|d| d.running).count();
            let expected = usize::from(number == self.vm_host);
            assert_eq!(
                runs, expected,
                "{context}: domains running on host {number}"
            );
            assert!(
                kernel.joins.is_empty(),
                "{context}: joins left on host {number}: {:?}",
                kernel.joins
            );
            for (ifindex, _) in &kernel.mdb {
                let ports = &kernel.ports;
                assert!(ports.contains_key(ifindex), "{context}: MDB entry left");
            }
            let managed: BTreeSet<_> = kernel.managed.keys().copied().collect();
            let needed: BTreeSet<_> = kernel
                .listeners
                .keys()
                .map(|listener| ManagedKey {
                    vlan: listener.vlan,
                    bridge: listener.bridge,
                    multicast_address: listener.multicast_address,
                })
                .collect();
            assert_eq!(managed, needed, "{context}: managed on host {number}");
            assert!(
                kernel.gates.is_empty(),
                "{context}: gates left on host {number}: {:?}",
                kernel.gates
            );
            assert!(
                kernel.watched.is_empty(),
                "{context}: addresses watched on host {number}: {:?}",
                kernel.watched
            );
            assert!(
                kernel.forwards.is_empty(),
                "{context}: forwards left on host {number}: {:?}",
                kernel.forwards
            );
            assert!(
                kernel.translations.is_empty(),
                "{context}: translations left on host {number}: {:?}",
                kernel.translations
            );
            let agent = host.agent.as_ref().unwrap();
            assert_eq!(
                agent.view().receptions().count(),
                0,
                "{context}: receptions"
            );
        }
    }
}
