//! The bridges of the host: what the agent watches on each, and what it changes there.
//!
//! ```text
//!  Links ─────────┐                     ┌──▶ VmSocket
//!  LinkAddresses ─┼──▶ Bridge::next ... ├──▶ Memberships, Mdb
//!  VmSocket ──────┘                     └──▶ LinkAddresses
//! ```
//!
//! Each key, port and address of the protocol names its bridge by number; [`Bridges`] finds the
//! bridge.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::net::SocketAddrV6;

use common::maps::{BridgeNumber, ManagedKey};
use futures::future::select_all;

use super::RuntimeError;
use crate::net::link_addresses::LinkAddresses;
use crate::net::links::{LinkEvent, Links, PortRules};
use crate::net::mdb::{Mdb, MdbError};
use crate::net::membership::{MembershipError, Memberships};
use crate::net::snooping;
use crate::net::vm_socket::{VmDatagram, VmSocket};
use crate::proto::{AddressCommand, AddressEvent, DatapathEvent, MdbEntry, Membership};

/// One bridge of the host, and everything that the agent holds on this bridge.
pub(super) struct Bridge {
    number: BridgeNumber,
    name: String,
    links: Links,
    mdb: Mdb,
    memberships: Memberships,
    addresses: LinkAddresses,
    vm_socket: VmSocket,
    /// True once the ports that existed at the start are reported.
    ports_known: bool,
}

/// An event on one bridge.
pub(super) enum BridgeEvent {
    Link(LinkEvent),
    Address(AddressEvent),
    Datagram(VmDatagram),
}

impl Bridge {
    /// Opens a bridge with the number that the keys of the maps contain. `uplinks` are the names of
    /// the uplinks, and `groups` is the number of addresses that the bridge's multicast database
    /// must have room for.
    ///
    /// # Errors
    ///
    /// See [`RuntimeError`].
    pub(super) fn open(
        number: BridgeNumber,
        name: &str,
        uplinks: Vec<String>,
        groups: u32,
    ) -> Result<Self, RuntimeError> {
        let links = Links::watch(PortRules {
            bridge: name.to_owned(),
            number,
            uplinks,
            vm_ports: Vec::new(),
        })?;
        let ifindex = links.bridge_ifindex();
        let mdb = Mdb::open(name, number)?;
        for advice in mdb.snooping().advice(name) {
            tracing::warn!(bridge = name, "{advice}");
        }
        if mdb.snooping().hash_max < groups
            && let Err(error) = snooping::set_hash_max(ifindex, groups)
        {
            tracing::warn!(
                bridge = name,
                error = &error as &dyn Error,
                "VMs that listen to many addresses may make the bridge flood all multicast"
            );
        }
        Ok(Self {
            number,
            name: name.to_owned(),
            links,
            mdb,
            memberships: Memberships::new(ifindex),
            addresses: LinkAddresses::open(name, ifindex)?,
            vm_socket: VmSocket::open(name)?,
            ports_known: false,
        })
    }

    /// Returns the index of the bridge.
    pub(super) fn ifindex(&self) -> u32 {
        self.links.bridge_ifindex()
    }

    /// Waits for the next event on the bridge. Cancel safe.
    async fn next(&mut self) -> Result<BridgeEvent, RuntimeError> {
        loop {
            tokio::select! {
                event = self.links.next() => {
                    let event = event?;
                    self.follow(&event);
                    return Ok(BridgeEvent::Link(event));
                }
                Some(event) = self.addresses.next() => return Ok(BridgeEvent::Address(event)),
                datagram = self.vm_socket.recv() => match datagram {
                    Ok(datagram) => return Ok(BridgeEvent::Datagram(datagram)),
                    Err(error) => {
                        tracing::warn!(bridge = self.name, %error, "Cannot receive from VMs");
                    }
                },
            }
        }
    }

    /// Updates the parts that depend on the ports.
    fn follow(&mut self, event: &LinkEvent) {
        match event {
            LinkEvent::UplinkAdded(port) => self.addresses.uplink_added(port.ifindex),
            LinkEvent::UplinkRemoved { ifindex } => self.addresses.uplink_removed(*ifindex),
            LinkEvent::Complete => self.ports_known = true,
            LinkEvent::Port(_) | LinkEvent::OtherAdded(_) | LinkEvent::OtherRemoved { .. } => {}
        }
    }

    /// Sends a datagram to a VM.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub(super) async fn send(&self, to: SocketAddrV6, bytes: &[u8]) -> io::Result<()> {
        self.vm_socket.send(to, bytes).await
    }

    /// Returns the number of datagrams that found no room in the socket.
    fn dropped_datagrams(&self) -> u64 {
        self.vm_socket.dropped()
    }

    /// Takes or replaces the membership of an address, in a VLAN on the interface of that VLAN.
    ///
    /// # Errors
    ///
    /// See [`MembershipError`].
    pub(super) fn join(&mut self, membership: &Membership) -> Result<(), MembershipError> {
        let vlan = membership.key.vlan;
        let interface = format!("{}.{vlan}", self.name);
        if vlan != 0
            && let Ok(ifindex) = nix::net::if_::if_nametoindex(interface.as_str())
        {
            self.memberships.set_vlan_interface(vlan, ifindex);
        }
        self.memberships.join(membership)
    }

    /// Drops the membership of an address.
    pub(super) fn leave(&mut self, key: &ManagedKey) {
        self.memberships.leave(key);
    }

    /// Joins and leaves an address, so that the querier asks for listeners.
    ///
    /// # Errors
    ///
    /// See [`MembershipError`].
    pub(super) fn prune(&mut self, key: &ManagedKey) -> Result<(), MembershipError> {
        self.memberships.prune(key)
    }

    /// Adds or replaces entries of the multicast database; returns an outcome for each, in order.
    ///
    /// # Errors
    ///
    /// As [`Mdb::add`].
    pub(super) fn mdb_add(
        &mut self,
        entries: &[(u32, &Membership)],
    ) -> Result<Vec<Result<(), MdbError>>, MdbError> {
        self.mdb.add(entries)
    }

    /// Deletes entries of the multicast database. A missing entry counts as deleted.
    ///
    /// # Errors
    ///
    /// As [`Mdb::delete`].
    pub(super) fn mdb_delete(&mut self, entries: &[MdbEntry]) -> Result<(), MdbError> {
        self.mdb.delete(entries).map(drop)
    }

    /// Carries out a command for a unicast address on the bridge's link.
    pub(super) fn handle_address(&mut self, command: &AddressCommand) {
        self.addresses.perform(command);
    }
}

/// The bridges of the agent, by number.
pub(super) struct Bridges<B = Bridge> {
    by_number: BTreeMap<BridgeNumber, B>,
    /// Number of calls of [`Bridges::next`].
    calls: usize,
    unknown: u64,
}

impl<B> Bridges<B> {
    pub(super) fn new(bridges: impl IntoIterator<Item = (BridgeNumber, B)>) -> Self {
        Self {
            by_number: bridges.into_iter().collect(),
            calls: 0,
            unknown: 0,
        }
    }

    /// Returns a bridge. Counts the call if there is no bridge with this number: the bridge is gone,
    /// and what was meant for it has no effect.
    pub(super) fn of(&mut self, number: BridgeNumber) -> Option<&mut B> {
        let found = self.by_number.get_mut(&number);
        if found.is_none() {
            self.unknown += 1;
            tracing::debug!(number = number.0, "No bridge has this number");
        }
        found
    }

    /// Returns the part of an event that concerns bridges of this agent. A program that an earlier
    /// agent attached may still report for a bridge that this agent does not have; such events are
    /// counted.
    pub(super) fn admit(&mut self, mut event: DatapathEvent) -> Option<DatapathEvent> {
        let mut is_known = |number: BridgeNumber| {
            let is_known = self.by_number.contains_key(&number);
            self.unknown += u64::from(!is_known);
            is_known
        };
        let is_admitted = match &mut event {
            DatapathEvent::Listener { key, .. } => is_known(key.bridge),
            DatapathEvent::Source { key, .. } => is_known(key.listener.bridge),
            DatapathEvent::FirstPacket { key, .. } => is_known(key.bridge),
            DatapathEvent::Query { key, .. } => is_known(key.bridge),
            DatapathEvent::Failed { key, .. } => is_known(key.bridge),
            DatapathEvent::Refused { listeners, sources } => {
                listeners.retain(|key| is_known(key.bridge));
                sources.retain(|key| is_known(key.listener.bridge));
                !listeners.is_empty() || !sources.is_empty()
            }
            DatapathEvent::Snapshot {
                listeners,
                sources,
                queriers,
            } => {
                listeners.retain(|(key, _)| is_known(key.bridge));
                sources.retain(|(key, _)| is_known(key.listener.bridge));
                queriers.retain(|(key, _)| is_known(key.bridge));
                true
            }
            DatapathEvent::Usage { .. } | DatapathEvent::Streams { .. } => true,
        };
        is_admitted.then_some(event)
    }

    /// Returns how often something concerned a bridge that the agent does not have.
    pub(super) fn unknown(&self) -> u64 {
        self.unknown
    }
}

impl Bridges {
    /// Waits for the next event on any bridge. Cancel safe.
    ///
    /// # Errors
    ///
    /// See [`RuntimeError`]: the agent has lost a bridge.
    pub(super) async fn next(&mut self) -> Result<(BridgeNumber, BridgeEvent), RuntimeError> {
        self.calls = self.calls.wrapping_add(1);
        let bridges = self.by_number.values_mut();
        let mut waiting: Vec<_> = bridges
            .map(|bridge| {
                Box::pin(async move {
                    let number = bridge.number;
                    bridge.next().await.map(|event| (number, event))
                })
            })
            .collect();
        if waiting.is_empty() {
            return std::future::pending().await;
        }
        // A bridge with many events must not keep the others waiting.
        let first = self.calls % waiting.len();
        waiting.rotate_left(first);
        select_all(waiting).await.0
    }

    /// Returns true once the ports of all bridges are reported.
    pub(super) fn are_ports_known(&self) -> bool {
        self.by_number.values().all(|bridge| bridge.ports_known)
    }

    /// Advertises the host's own addresses on the links where moving VMs have addresses.
    pub(super) fn announce(&self) {
        for bridge in self.by_number.values() {
            bridge.addresses.announce();
        }
    }

    /// Returns the number of VMs' datagrams that found no room in a socket.
    pub(super) fn dropped_datagrams(&self) -> u64 {
        self.by_number.values().map(Bridge::dropped_datagrams).sum()
    }
}

#[cfg(test)]
mod tests {
    use common::event::Change;
    use common::maps::{FilterMode, Listener, ListenerKey};

    use super::*;

    const OWN: BridgeNumber = BridgeNumber(2);
    const GONE: BridgeNumber = BridgeNumber(7);

    fn bridges() -> Bridges<&'static str> {
        Bridges::new([(OWN, "br0")])
    }

    fn listener(bridge: BridgeNumber) -> (ListenerKey, Listener) {
        let key = ListenerKey {
            ifindex: 9,
            vlan: 0,
            bridge,
            multicast_address: [0xff; 16],
        };
        let value = Listener {
            filter_mode: FilterMode::Exclude as u8,
            ..Listener::NONE
        };
        (key, value)
    }

    #[test]
    fn what_is_for_a_bridge_that_is_gone_is_counted_and_has_no_effect() {
        let mut bridges = bridges();
        assert_eq!(bridges.of(OWN).copied(), Some("br0"));
        assert_eq!(bridges.unknown(), 0);
        assert_eq!(bridges.of(GONE), None);
        assert_eq!(bridges.unknown(), 1);
    }

    #[test]
    fn events_of_a_bridge_that_is_gone_are_counted_and_ignored() {
        let mut bridges = bridges();
        let event = |bridge| {
            let (key, value) = listener(bridge);
            let change = Change::Updated;
            DatapathEvent::Listener { change, key, value }
        };
        assert_eq!(bridges.admit(event(OWN)), Some(event(OWN)));
        assert_eq!(bridges.admit(event(GONE)), None);
        assert_eq!(bridges.unknown(), 1);
    }

    #[test]
    fn snapshot_keeps_the_entries_of_own_bridges() {
        let mut bridges = bridges();
        let snapshot = |numbers: &[BridgeNumber]| DatapathEvent::Snapshot {
            listeners: numbers.iter().map(|number| listener(*number)).collect(),
            sources: vec![],
            queriers: vec![],
        };
        let admitted = bridges.admit(snapshot(&[GONE, OWN]));
        assert_eq!(admitted, Some(snapshot(&[OWN])));
        assert_eq!(bridges.unknown(), 1);
    }
}
