//! What goes into the mapping server and comes out of it.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use super::{Hoa, Record};
use crate::proto::Timestamp;
use crate::value::Prefix;

/// How a server is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where all HoAs are.
    pub home: Prefix,
    /// How far the time of an update may be from the server's.
    pub time_window: Duration,
    /// Shortest life of a mapping.
    pub min_lifetime: Duration,
    /// Longest.
    pub max_lifetime: Duration,
    /// Longest use of an answer.
    pub lookup_lifetime: Duration,
    /// Use of the answer that there is no mapping.
    pub negative_lifetime: Duration,
    /// Requests of one source address a second.
    pub requests_per_second: u32,
    /// And at once.
    pub burst: u32,
    /// Source addresses that are told apart.
    pub sources: usize,
}

/// The time of an input, on both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// What everything is measured with.
    pub monotonic: Timestamp,
    /// Milliseconds since 1970: for times of nodes, and for what is stored.
    pub wall_ms: u64,
}

/// Where a datagram came from, and to, which is where its answer goes and comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// The other side.
    pub remote: SocketAddrV6,
    /// The address here.
    pub local: Ipv6Addr,
    /// Where it came in.
    pub ifindex: u32,
}

/// A datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Where to, and from.
    pub path: Path,
    /// The sealed message.
    pub bytes: Vec<u8>,
}

/// What is to be stored for a HoA, in place of what is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The HoA.
    pub hoa: Hoa,
    /// Its record.
    pub record: Record,
}

/// An answer to an operator who has enrolled a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// The number that the caller gave.
    pub request: u64,
    /// The generation in force; none if it could not be stored.
    pub generation: Option<u32>,
}
