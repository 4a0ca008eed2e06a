//! Bodies of the messages between a migration control server and its agents and relays.

use alloc::string::String;
use alloc::vec::Vec;

use minicbor::{Decode, Encode};

use super::bounded::{list, text};
use super::{Address, MAX_NAMED};

/// Role of a registered program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Role {
    /// Migrates VMs, and subscribes to relays.
    #[n(1)]
    Agent,
    /// Sends streams to agents as unicast.
    #[n(2)]
    Relay,
}

/// A range of multicast addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AddressRange {
    /// First address of the range, network order; host bits zero.
    #[n(0)]
    pub address: Address,
    /// Length of the prefix in bits, 0 to 128.
    #[n(1)]
    pub length: u8,
}

/// `Register`: an agent or a relay registers its address under the name in its certificate. A
/// repeated `Register` renews the lease and replaces the registration.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Register {
    /// Role of the sender.
    #[n(0)]
    pub role: Role,
    /// Address of the sender's signalling port.
    #[n(1)]
    pub address: Address,
    /// Name of the sender's site; empty for none.
    #[cbor(n(2), decode_with = "text")]
    pub site: String,
    /// Multicast addresses that a relay serves; empty for all.
    #[cbor(n(3), decode_with = "list::<_, _, MAX_NAMED>")]
    pub serves: Vec<AddressRange>,
}

/// `Registered`: answers `Register`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Registered {
    /// Duration of the registration without another `Register`, milliseconds.
    #[n(0)]
    pub lease_ms: u64,
}

/// `RelaySearch`: an agent searches relays for a multicast address.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RelaySearch {
    /// Multicast address to receive, network order.
    #[n(0)]
    pub multicast_address: Address,
    /// Name of the agent's site; empty for none.
    #[cbor(n(1), decode_with = "text")]
    pub site: String,
}

/// Name and address of a relay.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KnownRelay {
    /// Name in its certificate.
    #[cbor(n(0), decode_with = "text")]
    pub name: String,
    /// Address of the relay's signalling port.
    #[n(1)]
    pub address: Address,
}

/// `RelaySearchReply`: relays that serve the address, best first.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RelaySearchReply {
    /// Relays of the agent's site first; each reply rotates the first relay.
    #[cbor(n(0), decode_with = "list::<_, _, MAX_NAMED>")]
    pub relays: Vec<KnownRelay>,
}
