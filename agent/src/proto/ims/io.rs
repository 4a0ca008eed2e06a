//! Inputs and outputs of the mapping server.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::time::Duration;

use super::{Hoa, Record, Version};
use crate::proto::Timestamp;
use crate::value::Prefix;

/// Configuration of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Prefix of all HoAs.
    pub home: Prefix,
    /// Maximum difference between an update's time and the server's time.
    pub time_window: Duration,
    /// Shortest lifetime of a mapping.
    pub min_lifetime: Duration,
    /// Longest lifetime of a mapping.
    pub max_lifetime: Duration,
    /// Longest validity of an answer.
    pub lookup_lifetime: Duration,
    /// Validity of an answer without a mapping.
    pub negative_lifetime: Duration,
    /// Requests per second from one source address.
    pub requests_per_second: u32,
    /// Burst of requests from one source address.
    pub burst: u32,
    /// Limit of distinguished source addresses.
    pub sources: usize,
}

/// Time of an input, on both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Clock for all durations.
    pub monotonic: Timestamp,
    /// Milliseconds since 1970, for times of nodes and for stored times.
    pub wall_ms: u64,
}

/// Addresses and interface of a datagram; the answer takes the reverse path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Source address and port of the datagram.
    pub remote: SocketAddrV6,
    /// Destination address of the datagram.
    pub local: Ipv6Addr,
    /// Interface index of the datagram's arrival.
    pub ifindex: u32,
}

/// A datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Path of the request.
    pub path: Path,
    /// Sealed message.
    pub bytes: Vec<u8>,
}

/// Record to store for a HoA, in place of the expected one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// Key of the record in the store.
    pub hoa: Hoa,
    /// Version of the record to replace; `None`: the store has no record of the HoA.
    pub expected: Option<Version>,
    /// State of the node to store.
    pub record: Record,
}

/// Answer to an operator who enrolls a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Enrolled {
    /// Number from the caller's request.
    pub request: u64,
    /// Generation in force; `None` if the write failed.
    pub generation: Option<u32>,
}
