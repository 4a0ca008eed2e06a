//! Operator's view of an agent.

use common::maps::{PortUsage, Querier, QuerierKey};

use super::machines::Machines;
use super::reception::{ModeView, RelayView, SessionView};
use super::{
    CopyTls, Counters, Domain, ListenerView, MigrationRecord, Port, ReceptionView, Timestamp,
    WaitingView,
};

/// Read access to an agent for an operator.
#[derive(Clone, Copy, Debug)]
pub struct View<'a>(pub(super) &'a Machines);

impl<'a> View<'a> {
    /// Returns the listeners of all ports.
    pub fn listeners(self) -> impl Iterator<Item = ListenerView<'a>> + use<'a> {
        self.0.mirror.iter()
    }

    /// Returns the listeners behind one TAP, with their current source lists.
    pub fn listeners_of_port(
        self,
        ifindex: u32,
    ) -> impl Iterator<Item = ListenerView<'a>> + use<'a> {
        self.0.mirror.of_port(ifindex)
    }

    /// Returns the addresses joined by proxy for arriving VMs.
    pub fn receptions(self) -> impl Iterator<Item = ReceptionView<'a>> + use<'a> {
        self.0.arrivals.views()
    }

    /// Returns the mode of each watched address.
    pub fn modes(self) -> impl Iterator<Item = ModeView> + use<'a> {
        self.0.receptions.modes(self.0.cx.now)
    }

    /// Returns the relays that discovery found.
    pub fn relays(self) -> impl Iterator<Item = RelayView<'a>> + use<'a> {
        self.0.receptions.relays(&self.0.cx)
    }

    /// Returns true if a peer of that name is a relay.
    pub fn is_relay(self, name: &str) -> bool {
        self.0.receptions.is_relay(name)
    }

    /// Returns the sessions with relays.
    pub fn relay_sessions(self) -> impl Iterator<Item = SessionView<'a>> + use<'a> {
        self.0.receptions.sessions(self.0.cx.now)
    }

    /// Returns the last migrations, oldest first, including running ones.
    pub fn migrations(self) -> impl Iterator<Item = &'a MigrationRecord> + use<'a> {
        self.0.cx.records.iter()
    }

    /// Returns a migration by its number; `None` if the record was evicted.
    pub fn migration(self, number: u64) -> Option<&'a MigrationRecord> {
        self.0.cx.records.get(number)
    }

    /// Returns the last reading of a port's `PORT_USAGE`; `None` before the first.
    pub fn usage_of_port(self, ifindex: u32) -> Option<&'a PortUsage> {
        self.0.usage.of_port(ifindex)
    }

    /// Returns whether QEMU can encrypt memory copies on this host, and the obstacle if not.
    pub fn copy_tls(self) -> &'a CopyTls {
        &self.0.cx.copy_tls
    }

    /// Returns the domains of this host.
    pub fn domains(self) -> impl Iterator<Item = &'a Domain> + use<'a> {
        self.0.inventory.domains.values()
    }

    /// Returns the domain behind a port.
    pub fn domain_of_port(self, ifindex: u32) -> Option<&'a Domain> {
        self.0.inventory.domain_of_port(ifindex)
    }

    /// Returns the domains that wait for a place at `now`, in order of their turns.
    pub fn waiting(self, now: Timestamp) -> impl Iterator<Item = WaitingView<'a>> + use<'a> {
        self.0.arrivals.waiting(now)
    }

    /// Returns the TAPs on the managed bridge.
    pub fn ports(self) -> impl Iterator<Item = &'a Port> + use<'a> {
        self.0.inventory.ports.values()
    }

    /// Returns the elected querier of each link.
    pub fn queriers(self) -> impl Iterator<Item = (&'a QuerierKey, &'a Querier)> + use<'a> {
        self.0.mirror.queriers().elected()
    }

    /// Returns the peers with an established connection.
    pub fn connected_peers(self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.0.cx.links.connected()
    }

    /// Returns true while the connection to libvirt is up.
    pub fn is_hypervisor_connected(self) -> bool {
        self.0.inventory.hypervisor_connected
    }

    /// Returns the counters of ignored and refused input.
    pub fn counters(self) -> Counters {
        self.0.cx.counters
    }
}
