//! MAT, unicast mobility: a node keeps one address while it moves between links.
//!
//! Applications of a node use its HoA, an address on `mat0` that no router knows. Packets on the
//! wire have MoAs, the current addresses of the node's NICs; the kernel programs `mat_out` and
//! `mat_in` translate between HoA and MoA at both ends. The mapping server (IMS) stores the MoAs of
//! each HoA. The protocol follows draft-inayat-mat-00 (§3.6 alerts, §3.9 two interfaces, §4
//! messages); in addition it encrypts every message, and it adds no byte to data packets.
//!
//! ```text
//!  application                                                     application
//!      | HoA a -> HoA b                              HoA a -> HoA b ^
//!  mat0 `mat_out`                                                   | `mat_in` on each NIC
//!      | MoA a -> MoA b       routers see MoAs only                 |
//!    active NIC ----------------------------------------------------'
//! ```
//!
//! # Messages
//!
//! ```text
//!     node a                         IMS                          node b
//!       | UpdateRequest (MoAs of a)   |                             |
//!       |---------------------------->|                             |
//!       |<---------------- UpdateReply|                             |
//!       | LookupRequest (b)           |                             |
//!       |---------------------------->|                             |
//!       |<---- LookupReply (MoAs, pair key)                         |
//!       | Alert ----------------------------------------------------->|  first packets wait
//!       |                             |<------- LookupRequest (a)   |
//!       |                             |-------> LookupReply         |
//!       |<------------------------------------------------- Echo    |
//!       | EchoReply ------------------------------------------------->|  address of a is verified
//!       |<------------------------------------------------ AlertAck |
//!       |================ data, translated at both ends ============|
//! ```
//!
//! A node that moves registers its new MoA with priority 2 and alerts its peers. After the move the
//! node exchanges the priorities and alerts its peers again. An alert carries no address. The peer
//! reads the mapping from the IMS, or chooses another MoA of the mapping that it has, and sends
//! data to a MoA only after the MoA answered an [`message::Echo`].
//!
//! | module | contents |
//! |---|---|
//! | [`neutral`] | MoAs that keep checksums valid |
//! | [`translate`] | the decision about each packet |
//! | [`maps`], [`counter`] | layouts and counters of the kernel programs |
//! | `entropy` | source of random numbers (feature `user`) |
//! | `key` | keys of nodes and pairs of nodes (feature `user`) |
//! | `message` | messages (feature `user`) |
//! | `seal` | encryption and wire format of messages (feature `user`) |

pub mod counter;
#[cfg(feature = "user")]
pub mod entropy;
#[cfg(feature = "user")]
pub mod key;
pub mod maps;
#[cfg(feature = "user")]
pub mod message;
pub mod neutral;
#[cfg(feature = "user")]
pub mod seal;
pub mod translate;

/// UDP port of the IMS.
pub const IMS_PORT: u16 = 47413;
/// UDP port of a node, for other nodes.
pub const NODE_PORT: u16 = 47414;
/// Limit of MoAs per HoA.
pub const MAX_MOAS: usize = 8;
