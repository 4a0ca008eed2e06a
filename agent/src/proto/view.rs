//! What an operator sees of an agent.

use common::maps::{PortUsage, Querier, QuerierKey};

use super::machines::Machines;
use super::reception::{ModeView, RelayView, SessionView};
use super::{
    CopyTls, Counters, Domain, ListenerView, MigrationRecord, Port, ReceptionView, Timestamp,
    WaitingView,
};

/// What an operator sees of an agent.
#[derive(Clone, Copy, Debug)]
pub struct View<'a>(pub(super) &'a Machines);

impl<'a> View<'a> {
    /// All listeners of all ports.
    pub fn listeners(self) -> impl Iterator<Item = ListenerView<'a>> + use<'a> {
        self.0.mirror.iter()
    }

    /// The listeners of one port.
    pub fn listeners_of_port(
        self,
        ifindex: u32,
    ) -> impl Iterator<Item = ListenerView<'a>> + use<'a> {
        self.0.mirror.of_port(ifindex)
    }

    /// The addresses joined by proxy.
    pub fn receptions(self) -> impl Iterator<Item = ReceptionView<'a>> + use<'a> {
        self.0.arrivals.views()
    }

    /// How each watched address is received.
    pub fn modes(self) -> impl Iterator<Item = ModeView> + use<'a> {
        self.0.receptions.modes(self.0.cx.now)
    }

    /// The relays that discovery has found.
    pub fn relays(self) -> impl Iterator<Item = RelayView<'a>> + use<'a> {
        self.0.receptions.relays(&self.0.cx)
    }

    /// Whether a peer is a relay.
    pub fn is_relay(self, name: &str) -> bool {
        self.0.receptions.is_relay(name)
    }

    /// The sessions with relays.
    pub fn relay_sessions(self) -> impl Iterator<Item = SessionView<'a>> + use<'a> {
        self.0.receptions.sessions(self.0.cx.now)
    }

    /// The last migrations, oldest first, running ones included.
    pub fn migrations(self) -> impl Iterator<Item = &'a MigrationRecord> + use<'a> {
        self.0.cx.records.iter()
    }

    /// One of them, by its number.
    pub fn migration(self, number: u64) -> Option<&'a MigrationRecord> {
        self.0.cx.records.get(number)
    }

    /// The last usage read of a port.
    pub fn usage_of_port(self, ifindex: u32) -> Option<&'a PortUsage> {
        self.0.usage.of_port(ifindex)
    }

    /// Whether QEMU can encrypt copies here, and if not why.
    pub fn copy_tls(self) -> &'a CopyTls {
        &self.0.cx.copy_tls
    }

    /// The domains of this host.
    pub fn domains(self) -> impl Iterator<Item = &'a Domain> + use<'a> {
        self.0.inventory.domains.values()
    }

    /// The domain behind a port.
    pub fn domain_of_port(self, ifindex: u32) -> Option<&'a Domain> {
        self.0.inventory.domain_of_port(ifindex)
    }

    /// Domains that wait for a place at `now`, in the order of their turns.
    pub fn waiting(self, now: Timestamp) -> impl Iterator<Item = WaitingView<'a>> + use<'a> {
        self.0.arrivals.waiting(now)
    }

    /// The ports of the bridge.
    pub fn ports(self) -> impl Iterator<Item = &'a Port> + use<'a> {
        self.0.inventory.ports.values()
    }

    /// The queriers heard by the uplinks.
    pub fn queriers(self) -> impl Iterator<Item = (&'a QuerierKey, &'a Querier)> + use<'a> {
        self.0.mirror.queriers().elected()
    }

    /// The peers whose connection is up.
    pub fn connected_peers(self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.0.cx.links.connected()
    }

    /// Whether the hypervisor is connected.
    pub fn is_hypervisor_connected(self) -> bool {
        self.0.inventory.hypervisor_connected
    }

    /// What was not acted upon.
    pub fn counters(self) -> Counters {
        self.0.cx.counters
    }
}
