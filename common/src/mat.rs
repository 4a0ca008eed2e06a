//! MAT, the mobility of unicast: a node keeps one address while its place changes.
//!
//! A node's applications use its HoA, an address that is on `mat0` and routed nowhere. On the
//! wire stand MoAs, the addresses of its NICs where it is now; the kernel programs `mat_out` and
//! `mat_in` exchange one for the other at both ends. The mapping server (IMS) knows the MoAs of each
//! HoA. After draft-inayat-mat-00 (§3.6 alerts, §3.9 two interfaces, §4 messages), with every message
//! sealed and nothing added to data packets.
//!
//! ```text
//!  application                                                     application
//!      | HoA a -> HoA b                              HoA a -> HoA b ^
//!  mat0 `mat_out`                                                   | `mat_in` on each NIC
//!      | MoA a -> MoA b       routers see MoAs only                 |
//!    active NIC ----------------------------------------------------'
//! ```
//!
//! # Who tells whom what
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
//! A move: before it the new MoA is registered with priority 2 and peers are alerted; after it the
//! priorities change places and peers are alerted again. An alert carries no address: it makes the
//! peer read the IMS, or choose among the MoAs that the IMS has given it, and an address gets data
//! only once it has answered an [`message::Echo`].
//!
//! | module | holds |
//! |---|---|
//! | [`neutral`] | MoAs that leave checksums as they are |
//! | [`translate`] | what becomes of a packet |
//! | [`maps`], [`counter`] | what the kernel programs know and count |
//! | `entropy` | where random numbers come from (feature `user`) |
//! | `key` | keys of nodes and pairs (feature `user`) |
//! | `message` | messages (feature `user`) |
//! | `seal` | their encryption, the form on the wire (feature `user`) |

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
/// UDP port of a node, for its peers.
pub const NODE_PORT: u16 = 47414;
/// Most MoAs of one HoA.
pub const MAX_MOAS: usize = 8;
