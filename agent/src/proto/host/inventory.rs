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
    /// Which arriving domain a TAP is kept for that libvirt has given to none.
    pub(in crate::proto) lent: BTreeMap<u32, DomainUuid>,
    /// When the gate of a TAP was closed for an arrival for the first time.
    pub(in crate::proto) closed: BTreeMap<u32, Timestamp>,
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

    /// Returns the ports that belong to an expected domain: those that the hypervisor names, and
    /// before it does, those kept for it whose MAC libvirt has made of that of one of its NICs.
    pub(in crate::proto) fn ports_of_arrival(
        &self,
        uuid: &DomainUuid,
        macs: &[Mac],
    ) -> Vec<(u32, Mac)> {
        let mut found = self.ports_of_domain(uuid);
        for port in self.ports_of_nobody() {
            if self.lent.get(&port.ifindex) != Some(uuid) {
                continue;
            }
            if let Some(mac) = macs.iter().find(|mac| is_tap_of(&port.mac, mac)) {
                found.push((port.ifindex, *mac));
            }
        }
        found
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

    /// Forgets for how long gates were closed that may be closed anew: those of TAPs that are gone, or
    /// whose VM runs.
    pub(in crate::proto) fn forget_closed(&mut self) {
        let mut closed = std::mem::take(&mut self.closed);
        closed.retain(|ifindex, _| {
            let runs = self.domain_of_port(*ifindex).is_some_and(|it| it.running);
            self.ports.contains_key(ifindex) && !runs
        });
        self.closed = closed;
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
    fn port_kept_for_an_expected_domain_is_known_by_its_mac() {
        let mut inventory = inventory();
        let expected = [0x52, 0x54, 0, 0, 0, 2];
        let uuids = [2, 3].map(|number| DomainUuid([number; 16]));
        inventory.lent.insert(8, uuids[0]);
        let [kept, other] = uuids.map(|uuid| inventory.ports_of_arrival(&uuid, &[expected]));
        assert_eq!((kept, other), (vec![(8, expected)], vec![]));
    }

    #[test]
    fn port_of_another_domain_is_never_taken_for_an_expected_one() {
        let mut inventory = inventory();
        inventory.lent.insert(7, DomainUuid([2; 16]));
        let stolen = [0x52, 0x54, 0, 0, 0, 1];
        assert_eq!(
            inventory.ports_of_arrival(&DomainUuid([2; 16]), &[stolen]),
            []
        );
    }
}
