//! What this host has: the ports of its bridge and the domains of its hypervisor.

use std::collections::BTreeMap;

use tracing::{debug, warn};

use crate::proto::{Domain, DomainUuid, Mac, Port, Timestamp};

/// Ports and domains. Either may be told first.
#[derive(Debug, Default)]
pub(in crate::proto) struct Inventory {
    pub(in crate::proto) ports: BTreeMap<u32, Port>,
    pub(in crate::proto) domains: BTreeMap<DomainUuid, Domain>,
    /// Domains that libvirt is bringing here, with their names. It tells their TAPs only when they
    /// have arrived.
    pub(in crate::proto) arriving: BTreeMap<DomainUuid, String>,
    /// When domains that run here have come by a migration.
    pub(in crate::proto) came: BTreeMap<DomainUuid, Timestamp>,
    pub(in crate::proto) hypervisor_connected: bool,
}

/// Where a domain was that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proto) enum Place {
    Here,
    OnItsWay,
}

impl Inventory {
    /// The connection to the hypervisor is lost.
    pub(in crate::proto) fn disconnected(&mut self, reason: &str) {
        self.hypervisor_connected = false;
        warn!(%reason, "Hypervisor is not connected");
    }

    /// libvirt brings a domain here.
    pub(in crate::proto) fn domain_comes(&mut self, uuid: DomainUuid, name: String) {
        debug!(%uuid, name, "libvirt brings a domain");
        self.arriving.insert(uuid, name);
    }

    /// A domain is here, or has changed.
    pub(in crate::proto) fn domain_seen(&mut self, domain: Domain) {
        self.arriving.remove(&domain.uuid);
        self.domains.insert(domain.uuid, domain);
    }

    /// A domain's CPUs run here.
    pub(in crate::proto) fn domain_runs(&mut self, uuid: &DomainUuid) {
        if let Some(domain) = self.domains.get_mut(uuid) {
            domain.running = true;
        }
    }

    /// A domain is gone, or does not arrive.
    pub(in crate::proto) fn domain_gone(&mut self, uuid: &DomainUuid) -> Place {
        let came = self.arriving.remove(uuid).is_some();
        if came && !self.domains.contains_key(uuid) {
            return Place::OnItsWay;
        }
        self.domains.remove(uuid);
        self.came.remove(uuid);
        Place::Here
    }

    /// Returns the domain behind a port, by the name of its TAP.
    pub(in crate::proto) fn domain_of_port(&self, ifindex: u32) -> Option<&Domain> {
        let port = self.ports.get(&ifindex)?;
        self.domains.values().find(|domain| {
            domain
                .interfaces
                .iter()
                .any(|interface| interface.target_dev == port.name)
        })
    }

    /// Returns the ports of a domain with the MACs of the NICs behind them.
    pub(in crate::proto) fn ports_of_domain(&self, uuid: &DomainUuid) -> Vec<(u32, Mac)> {
        let Some(domain) = self.domains.get(uuid) else {
            return Vec::new();
        };
        self.ports
            .values()
            .filter_map(|port| {
                let interface = domain
                    .interfaces
                    .iter()
                    .find(|interface| interface.target_dev == port.name)?;
                Some((port.ifindex, interface.mac))
            })
            .collect()
    }

    /// Returns the ports that no domain has.
    pub(in crate::proto) fn ports_of_nobody(&self) -> impl Iterator<Item = &Port> {
        self.ports
            .values()
            .filter(|port| self.domain_of_port(port.ifindex).is_none())
    }

    /// What libvirt calls a domain that is here or on its way here.
    pub(in crate::proto) fn name_of(&self, uuid: &DomainUuid) -> Option<&str> {
        let here = self.domains.get(uuid).map(|domain| &domain.name);
        here.or_else(|| self.arriving.get(uuid)).map(String::as_str)
    }

    /// The UUID of the domain of that name that is here or on its way here.
    pub(in crate::proto) fn uuid_of(&self, name: &str) -> Option<DomainUuid> {
        let here = self.domains.values().find(|domain| domain.name == name);
        let arriving = || self.arriving.iter().find(|(_, known)| *known == name);
        here.map(|domain| domain.uuid)
            .or_else(|| arriving().map(|(uuid, _)| *uuid))
    }

    /// Whether libvirt says that a domain is here, or on its way here.
    pub(in crate::proto) fn comes(&self, uuid: &DomainUuid) -> bool {
        self.arriving.contains_key(uuid) || self.domains.contains_key(uuid)
    }

    /// Returns a domain by its name or UUID.
    pub(in crate::proto) fn domain_by_name(&self, name: &str) -> Option<&Domain> {
        self.domains
            .values()
            .find(|domain| domain.name == name || domain.uuid.to_string() == name)
    }
}

/// Whether libvirt made a TAP's MAC of a guest's MAC: the same but for the first byte, `fe`, which
/// keeps the bridge from taking the TAP's MAC for its own.
pub(in crate::proto) fn is_tap_of(tap: &Mac, guest: &Mac) -> bool {
    tap[0] == 0xfe && tap[1..] == guest[1..]
}

#[cfg(test)]
pub(in crate::proto) mod tests {
    use super::*;
    use crate::proto::DomainInterface;

    pub(in crate::proto) fn inventory() -> Inventory {
        let mut inventory = Inventory::default();
        let domain = Domain {
            uuid: DomainUuid([1; 16]),
            name: "viewer".to_owned(),
            running: true,
            interfaces: vec![DomainInterface {
                target_dev: "vnet0".to_owned(),
                mac: [0x52, 0x54, 0, 0, 0, 1],
                vhost: false,
            }],
        };
        inventory.domains.insert(domain.uuid, domain);
        for (ifindex, name, last) in [(7, "vnet0", 1), (8, "vnet1", 2)] {
            let port = Port {
                ifindex,
                name: name.to_owned(),
                mac: [0xfe, 0x54, 0, 0, 0, last],
            };
            inventory.ports.insert(ifindex, port);
        }
        inventory
    }

    #[test]
    fn port_belongs_to_the_domain_that_names_its_tap() {
        let inventory = inventory();
        assert_eq!(inventory.domain_of_port(7).unwrap().name, "viewer");
        assert!(inventory.domain_of_port(8).is_none());
        assert!(inventory.domain_of_port(9).is_none());
    }
}
