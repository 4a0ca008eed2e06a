//! Bodies of the messages between a migration control server and the agents and relays that it
//! knows.

use alloc::string::String;
use alloc::vec::Vec;

use minicbor::{Decode, Encode};

use super::bounded::{list, text};
use super::{Address, MAX_NAMED};

/// What registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Role {
    /// An agent.
    #[n(1)]
    Agent,
    /// A relay.
    #[n(2)]
    Relay,
}

/// A range of multicast addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct AddressRange {
    /// Its first address.
    #[n(0)]
    pub address: Address,
    /// Length of the prefix in bits, 0 to 128.
    #[n(1)]
    pub length: u8,
}

/// `Register`: an agent or a relay says where it is. Its name is that of its certificate. Said
/// again, it renews the lease and changes what is known.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Register {
    /// What it is.
    #[n(0)]
    pub role: Role,
    /// Where others reach it, on the port of all signalling.
    #[n(1)]
    pub address: Address,
    /// Name of its site; empty for none.
    #[cbor(n(2), decode_with = "text")]
    pub site: String,
    /// Multicast addresses that a relay serves; none for all.
    #[cbor(n(3), decode_with = "list::<_, _, MAX_NAMED>")]
    pub serves: Vec<AddressRange>,
}

/// `Registered`: the answer to `Register`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Registered {
    /// How long it is remembered without another `Register`, milliseconds.
    #[n(0)]
    pub lease_ms: u64,
}

/// `RelaySearch`: an agent asks for relays.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RelaySearch {
    /// Multicast address that it wants.
    #[n(0)]
    pub multicast_address: Address,
    /// Name of the agent's site; empty for none.
    #[cbor(n(1), decode_with = "text")]
    pub site: String,
}

/// A relay and where it is.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct KnownRelay {
    /// Name in its certificate.
    #[cbor(n(0), decode_with = "text")]
    pub name: String,
    /// Where it is reached.
    #[n(1)]
    pub address: Address,
}

/// `RelaySearchReply`: relays that serve the address, the best first.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct RelaySearchReply {
    /// Those of the agent's site before others, each time another one first.
    #[cbor(n(0), decode_with = "list::<_, _, MAX_NAMED>")]
    pub relays: Vec<KnownRelay>,
}
