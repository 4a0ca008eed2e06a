//! The bridge's forwarding database: which port frames for a MAC go to.
//!
//! An entry for a VM that has not sent anything yet keeps frames for it from being flooded to all
//! others, and lets them wait in its TAP.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST};

use super::netlink::{Refusal, RequestBytes, Requests};
use crate::proto::Mac;

const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const NDA_LLADDR: u16 = 2;
const NTF_MASTER: u8 = 4;
const NUD_REACHABLE: u16 = 0x02;
const NUD_NOARP: u16 = 0x40;

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
    requests: Requests,
}

impl Fdb {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// What `socket(2)` says.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            requests: Requests::open()?,
        })
    }

    /// Adds or replaces the entry of a MAC.
    ///
    /// # Errors
    ///
    /// What the kernel says, for instance that the port is gone.
    pub fn set(&mut self, port: u32, mac: Mac, entry: Entry) -> Result<(), Refusal> {
        let state = match entry {
            Entry::Static => NUD_NOARP,
            Entry::Learnt => NUD_REACHABLE,
        };
        let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.apply(request(RTM_NEWNEIGH, flags, port, mac, state))
    }

    /// Removes the entry of a MAC.
    ///
    /// # Errors
    ///
    /// What the kernel says, for instance that there is none.
    pub fn remove(&mut self, port: u32, mac: Mac) -> Result<(), Refusal> {
        let flags = NLM_F_REQUEST | NLM_F_ACK;
        self.apply(request(RTM_DELNEIGH, flags, port, mac, 0))
    }

    fn apply(&mut self, request: Vec<u8>) -> Result<(), Refusal> {
        let outcomes = self.requests.apply(&mut [request])?;
        outcomes.into_iter().collect()
    }
}

/// `struct ndmsg` with the MAC.
fn request(kind: u16, options: u16, port: u32, mac: Mac, state: u16) -> Vec<u8> {
    let mut request = RequestBytes::new(kind, options);
    request.push(&[libc::AF_BRIDGE as u8, 0, 0, 0]);
    request.push(&port.to_ne_bytes());
    request.push(&state.to_ne_bytes());
    request.push(&[NTF_MASTER, 0]);
    request.attribute(NDA_LLADDR, &mac);
    request.finish()
}
