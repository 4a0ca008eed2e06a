//! The bridge's forwarding database: the port of each MAC.
//!
//! An entry for a VM that has not sent a frame yet keeps its frames from being flooded to all other
//! ports; they wait in its TAP instead.

use std::io;

use linux::netlink::{Netlink, Refusal};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::proto::Mac;

/// Type of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Stays, whatever the state of the port, until the port is deleted (`NUD_NOARP`).
    Static,
    /// Like an entry that the bridge has learnt: ages, and follows the VM to another port.
    Learnt,
}

/// Write access to the forwarding database, in the network namespace of the thread that opened it.
pub struct Fdb {
    netlink: Netlink,
}

impl Fdb {
    /// Opens a netlink socket.
    ///
    /// # Errors
    ///
    /// The error of `socket(2)`.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
        })
    }

    /// Adds or replaces the entry of a MAC.
    ///
    /// # Errors
    ///
    /// The error of the kernel, for instance that the port no longer exists.
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
    /// The error of the kernel, for instance that there is no such entry.
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
