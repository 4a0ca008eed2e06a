//! One interface on which the relay receives multicast: its program and its joins.

use std::net::Ipv6Addr;

use common::maps::{FilterMode, ManagedKey};

use super::RelayError;
use crate::datapath::Datapath;
use crate::net::addresses::AddressesError;
use crate::net::fd_store::FdStore;
use crate::net::membership::{MembershipError, Memberships};
use crate::net::static_join::StaticJoins;
use crate::proto::Membership;

/// Program and joins of one interface.
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) ifindex: u32,
    memberships: Memberships,
    static_joins: StaticJoins,
    store: FdStore,
}

impl Interface {
    /// Attaches the program or adopts an attached one. Joins nothing.
    pub(super) fn open(datapath: &Datapath, name: &str) -> Result<Self, RelayError> {
        let ifindex = index(name).ok_or_else(|| AddressesError::NoInterface(name.to_owned()))?;
        let attachment = datapath.attach_replicate(ifindex, name)?;
        tracing::info!(
            interface = name,
            ifindex,
            adopted = attachment.adopted,
            "Streams of this interface are relayed"
        );
        Ok(Self {
            name: name.to_owned(),
            ifindex,
            memberships: Memberships::new(ifindex),
            static_joins: StaticJoins::open(ifindex)?,
            store: FdStore::new(ifindex),
        })
    }

    /// Returns true if the interface exists and is still the same one.
    pub(super) fn is_there(&self) -> bool {
        index(&self.name) == Some(self.ifindex)
    }

    /// Attaches the program again if somebody has removed it.
    pub(super) fn attach_again(&self, datapath: &Datapath) {
        let attached = match datapath.lost(self.ifindex) {
            Ok(lost) if lost.is_empty() => return,
            Ok(_) => datapath.attach_replicate(self.ifindex, &self.name),
            Err(error) => Err(error),
        };
        match attached {
            Ok(_) => tracing::warn!(
                interface = self.name,
                "Somebody has taken the program away; attached again"
            ),
            Err(error) => tracing::error!(
                interface = self.name,
                error = &error as &dyn std::error::Error,
                "Somebody has taken the program away; nothing of this interface is relayed"
            ),
        }
    }

    /// Returns the addresses that the kernel holds joined, for this relay or an earlier one.
    pub(super) fn held_by_kernel(&mut self) -> Result<Vec<Ipv6Addr>, RelayError> {
        Ok(self.static_joins.list()?)
    }

    /// Returns true if [`Self::settle`] has work.
    pub(super) fn is_unsettled(&self) -> bool {
        self.static_joins.is_unsettled()
    }

    /// Completes joins. The caller repeats this every few milliseconds while
    /// [`Self::is_unsettled`].
    pub(super) fn settle(&mut self) -> Result<(), RelayError> {
        Ok(self.static_joins.settle()?)
    }

    /// Returns true if a socket of this process holds the join of an address.
    pub(super) fn is_held_by_socket(&self, key: &ManagedKey) -> bool {
        self.memberships.keys().any(|held| held == *key)
    }

    /// Joins such that the join outlives this process where possible: the kernel holds a join of
    /// any source, a socket holds a join of listed sources. Makes the new join before it leaves the
    /// old one.
    pub(super) fn join(&mut self, membership: &Membership) -> Result<(), MembershipError> {
        let key = &membership.key;
        let address = Ipv6Addr::from(key.multicast_address);
        let any_source =
            membership.filter_mode == FilterMode::Exclude && membership.sources.is_empty();
        if any_source {
            match self.static_joins.add(address) {
                Ok(()) => {
                    self.memberships.leave(key);
                    self.store.follow(self.memberships.sockets());
                    return Ok(());
                }
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "Joining by a socket, which ends with this process"
                ),
            }
        }
        let result = self.memberships.join(membership);
        self.store.follow(self.memberships.sockets());
        if result.is_ok() {
            self.leave_static(address);
        }
        result
    }

    /// Leaves an address, whether the kernel or a socket holds the join.
    pub(super) fn leave(&mut self, key: &ManagedKey) {
        self.memberships.leave(key);
        self.store.follow(self.memberships.sockets());
        self.leave_static(Ipv6Addr::from(key.multicast_address));
    }

    fn leave_static(&mut self, address: Ipv6Addr) {
        if let Err(error) = self.static_joins.remove(address) {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "Cannot leave; the stream goes on coming"
            );
        }
    }
}

fn index(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}
