//! Ports of the bridges and domains of the hypervisor.

use std::collections::BTreeMap;

use common::maps::BridgeNumber;
use tracing::{debug, warn};

use crate::proto::{Domain, DomainUuid, Mac, Port, Timestamp};

/// Ports and domains. A domain and its ports may be reported in either order.
#[derive(Debug, Default)]
pub(in crate::proto) struct Inventory {
    pub(in crate::proto) ports: BTreeMap<u32, Port>,
    pub(in crate::proto) domains: BTreeMap<DomainUuid, Domain>,
    /// Domains that libvirt is receiving, with their names. libvirt reports their TAPs only after the
    /// arrival.
    pub(in crate::proto) arriving: BTreeMap<DomainUuid, String>,
    /// Arrival times of the running domains that a migration brought.
    pub(in crate::proto) came: BTreeMap<DomainUuid, Timestamp>,
    pub(in crate::proto) hypervisor_connected: bool,
}

/// Former location of a vanished domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::proto) enum Place {
    Here,
    OnItsWay,
}

impl Inventory {
    /// Records that the connection to the hypervisor is lost.
    pub(in crate::proto) fn disconnected(&mut self, reason: &str) {
        self.hypervisor_connected = false;
        warn!(%reason, "Hypervisor is not connected");
    }

    /// Records that libvirt is receiving a domain.
    pub(in crate::proto) fn domain_comes(&mut self, uuid: DomainUuid, name: String) {
        debug!(%uuid, name, "libvirt brings a domain");
        self.arriving.insert(uuid, name);
    }

    /// Records a new or changed domain.
    pub(in crate::proto) fn domain_seen(&mut self, domain: Domain) {
        self.arriving.remove(&domain.uuid);
        self.domains.insert(domain.uuid, domain);
    }

    /// Records that a domain's CPUs run on this host.
    pub(in crate::proto) fn domain_runs(&mut self, uuid: &DomainUuid) {
        if let Some(domain) = self.domains.get_mut(uuid) {
            domain.running = true;
        }
    }

    /// Forgets a domain that vanished or did not arrive.
    pub(in crate::proto) fn domain_gone(&mut self, uuid: &DomainUuid) -> Place {
        let came = self.arriving.remove(uuid).is_some();
        if came && !self.domains.contains_key(uuid) {
            return Place::OnItsWay;
        }
        self.domains.remove(uuid);
        self.came.remove(uuid);
        Place::Here
    }

    /// Returns the bridge of a port.
    pub(in crate::proto) fn bridge_of(&self, ifindex: u32) -> Option<BridgeNumber> {
        Some(self.ports.get(&ifindex)?.bridge)
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

    /// Returns the ports without a domain.
    pub(in crate::proto) fn ports_of_nobody(&self) -> impl Iterator<Item = &Port> {
        self.ports
            .values()
            .filter(|port| self.domain_of_port(port.ifindex).is_none())
    }

    /// Returns libvirt's name of a domain on this host or arriving.
    pub(in crate::proto) fn name_of(&self, uuid: &DomainUuid) -> Option<&str> {
        let here = self.domains.get(uuid).map(|domain| &domain.name);
        here.or_else(|| self.arriving.get(uuid)).map(String::as_str)
    }

    /// Returns the UUID of the domain with that name, on this host or arriving.
    pub(in crate::proto) fn uuid_of(&self, name: &str) -> Option<DomainUuid> {
        let here = self.domains.values().find(|domain| domain.name == name);
        let arriving = || self.arriving.iter().find(|(_, known)| *known == name);
        here.map(|domain| domain.uuid)
            .or_else(|| arriving().map(|(uuid, _)| *uuid))
    }

    /// Returns true if a domain is on this host or arriving, according to libvirt.
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

/// Returns true if libvirt derived the TAP's MAC from the guest's MAC. Both are equal except for the
/// first byte, `fe`, which keeps the bridge from adopting the TAP's MAC as its own.
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
                bridge: BridgeNumber::FIRST,
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
