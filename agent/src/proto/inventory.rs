//! What this host has: the ports of its bridge and the domains of its hypervisor.

use std::collections::BTreeMap;

use super::{Domain, DomainUuid, Mac, Port};

/// Ports and domains. Either may be told first.
#[derive(Debug, Default)]
pub(super) struct Inventory {
    pub(super) ports: BTreeMap<u32, Port>,
    pub(super) domains: BTreeMap<DomainUuid, Domain>,
    pub(super) hypervisor_connected: bool,
}

impl Inventory {
    /// Returns the domain behind a port, by the name of its TAP.
    pub(super) fn domain_of_port(&self, ifindex: u32) -> Option<&Domain> {
        let port = self.ports.get(&ifindex)?;
        self.domains.values().find(|domain| {
            domain
                .interfaces
                .iter()
                .any(|interface| interface.target_dev == port.name)
        })
    }

    /// Returns the ports of a domain with the MACs of the NICs behind them.
    pub(super) fn ports_of_domain(&self, uuid: &DomainUuid) -> Vec<(u32, Mac)> {
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

    /// Returns the ports that belong to an expected domain: those that the hypervisor names, and
    /// before it does, those whose MAC libvirt has made of the MAC of one of the domain's NICs.
    pub(super) fn ports_of_arrival(&self, uuid: &DomainUuid, macs: &[Mac]) -> Vec<(u32, Mac)> {
        let mut found = self.ports_of_domain(uuid);
        for port in self.ports.values() {
            if found.iter().any(|(ifindex, _)| *ifindex == port.ifindex)
                || self.domain_of_port(port.ifindex).is_some()
            {
                continue;
            }
            if let Some(mac) = macs.iter().find(|mac| is_tap_of(&port.mac, mac)) {
                found.push((port.ifindex, *mac));
            }
        }
        found
    }

    /// Returns a domain by its name or UUID.
    pub(super) fn domain_by_name(&self, name: &str) -> Option<&Domain> {
        self.domains
            .values()
            .find(|domain| domain.name == name || domain.uuid.to_string() == name)
    }
}

/// Whether libvirt made a TAP's MAC of a guest's MAC: the same but for the first byte, `fe`, which
/// keeps the bridge from taking the TAP's MAC for its own.
fn is_tap_of(tap: &Mac, guest: &Mac) -> bool {
    tap[0] == 0xfe && tap[1..] == guest[1..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::DomainInterface;

    fn inventory() -> Inventory {
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

    #[test]
    fn port_of_an_expected_domain_is_known_by_its_mac() {
        let inventory = inventory();
        let expected = [0x52, 0x54, 0, 0, 0, 2];
        assert_eq!(
            inventory.ports_of_arrival(&DomainUuid([2; 16]), &[expected]),
            [(8, expected)]
        );
    }

    #[test]
    fn port_of_another_domain_is_never_taken_for_an_expected_one() {
        let inventory = inventory();
        let stolen = [0x52, 0x54, 0, 0, 0, 1];
        assert_eq!(
            inventory.ports_of_arrival(&DomainUuid([2; 16]), &[stolen]),
            []
        );
    }
}
