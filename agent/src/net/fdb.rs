//! The bridge's forwarding database: which port frames for a MAC go to.
//!
//! An entry for a VM that has not sent anything yet keeps frames for it from being flooded to all
//! others, and lets them wait in its TAP.

use std::io;

use linux::netlink::{Netlink, Refusal};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::proto::Mac;

/// What kind of entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Stays whatever the port's state, and until the port is gone.
    Static,
    /// As if the bridge had learnt it: ages, and follows the VM.
    Learnt,
}

/// Write access to the database, in the network namespace of the thread that opened it.
pub struct Fdb {
    netlink: Netlink,
}

impl Fdb {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// What `socket(2)` says.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
        })
    }

    /// Adds or replaces the entry of a MAC.
    ///
    /// # Errors
    ///
    /// What the kernel says, for instance that the port is gone.
    pub fn set(&mut self, port: u32, mac: Mac, entry: Entry) -> Result<(), Refusal> {
        let state = match entry {
            Entry::Static => NeighbourState::Noarp,
            Entry::Learnt => NeighbourState::Reachable,
        };
        let request = RouteNetlinkMessage::NewNeighbour(message(port, mac, state));
        Ok(self.netlink.change(request, NLM_F_CREATE | NLM_F_REPLACE)?)
    }

    /// Removes the entry of a MAC.
    ///
    /// # Errors
    ///
    /// What the kernel says, for instance that there is none.
    pub fn remove(&mut self, port: u32, mac: Mac) -> Result<(), Refusal> {
        let message = message(port, mac, NeighbourState::None);
        Ok(self
            .netlink
            .change(RouteNetlinkMessage::DelNeighbour(message), 0)?)
    }
}

fn message(port: u32, mac: Mac, state: NeighbourState) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    message.header.state = state;
    message.header.flags = NeighbourFlags::Controller;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
    message
}
