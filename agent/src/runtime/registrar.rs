//! The client of the migration control servers: registers this host, searches for relays and
//! remembers the answers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;

use common::signal::{PORT, Register};

use crate::clock::now;
use crate::config::Peer;
use crate::net::peers::Peers;
use crate::proto::directory::client::{ClientOutput, DirectoryClient};
use crate::proto::{PeerEvent, Timestamp};

/// Addresses to search for in one round; later rounds take the others.
const SEARCHES: usize = 64;

/// Registration with, and searches at, the migration control servers.
#[derive(Debug)]
pub(super) struct Registrar {
    client: DirectoryClient,
    /// Relays by name and address, for each multicast address.
    found: BTreeMap<[u8; 16], Vec<(String, String)>>,
    /// Last address of the previous round of searches.
    last: [u8; 16],
}

impl Registrar {
    pub(super) fn new(register: Register, servers: &[Peer]) -> Self {
        let names = servers
            .iter()
            .map(|server| server.name.as_str().to_ascii_lowercase());
        Self {
            client: DirectoryClient::new(register, names),
            found: BTreeMap::new(),
            last: [0; 16],
        }
    }

    /// Returns true if events of the connection to this peer belong to [`Self::handle_peer`].
    pub(super) fn is_server(&self, peer: &str) -> bool {
        self.client.is_server(peer)
    }

    /// Handles an event of the connection to a server. Returns true if the known relays have
    /// changed.
    pub(super) fn handle_peer(&mut self, peer: &str, event: PeerEvent, peers: &Peers) -> bool {
        self.client.handle_peer(now(), peer, event);
        self.perform(peers)
    }

    pub(super) fn handle_timeout(&mut self, peers: &Peers) {
        self.client.handle_timeout(now());
        self.perform(peers);
    }

    pub(super) fn poll_timeout(&self) -> Option<Timestamp> {
        self.client.poll_timeout()
    }

    /// Searches for relays of a new address.
    pub(super) fn search(&mut self, multicast_address: [u8; 16], peers: &Peers) {
        if self.client.servers().next().is_some() && !self.found.contains_key(&multicast_address) {
            self.found.insert(multicast_address, Vec::new());
            self.client.search(multicast_address);
            self.perform(peers);
        }
    }

    /// Searches again for some of the wanted addresses, and forgets all other addresses.
    pub(super) fn search_again(&mut self, wanted: &BTreeSet<[u8; 16]>, peers: &Peers) {
        self.found.retain(|address, _| wanted.contains(address));
        let last = self.last;
        let (before, after): (Vec<_>, Vec<_>) =
            self.found.keys().partition(|address| **address <= last);
        for address in after.into_iter().chain(before).copied().take(SEARCHES) {
            self.last = address;
            self.client.search(address);
        }
        self.perform(peers);
    }

    /// Returns the known relays by name and address.
    pub(super) fn relays(&self) -> Vec<(String, String)> {
        let relays: BTreeSet<_> = self.found.values().flatten().cloned().collect();
        relays.into_iter().collect()
    }

    /// Returns one sentence for each server with which this host is not registered.
    pub(super) fn problems(&self) -> impl Iterator<Item = String> {
        let missing = self.client.servers().filter(|(_, registered)| !registered);
        missing.map(|(name, _)| {
            format!("Migration control server {name} does not know this host; see the log")
        })
    }

    fn perform(&mut self, peers: &Peers) -> bool {
        let before = self.relays();
        while let Some(output) = self.client.poll_output() {
            match output {
                ClientOutput::Connect { peer } => peers.connect(&peer),
                ClientOutput::Frame { peer, bytes } => peers.send(&peer, bytes),
                ClientOutput::Found {
                    multicast_address,
                    relays,
                } => {
                    if let Some(found) = self.found.get_mut(&multicast_address) {
                        *found = relays
                            .into_iter()
                            .map(|relay| {
                                let address = Ipv6Addr::from(*relay.address);
                                (relay.name, format!("[{address}]:{PORT}"))
                            })
                            .collect();
                    }
                }
            }
        }
        before != self.relays()
    }
}
