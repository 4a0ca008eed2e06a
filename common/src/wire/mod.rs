//! Wire formats: Ethernet, IPv6, UDP, MLD, Neighbor Discovery, and which packets are signalling.
//!
//! The contract of every parser here: it reads through [`crate::packet::PacketRead`], never
//! panics, allocates nothing, and its loops have constant bounds, so that the kernel's verifier
//! accepts it. [`mld::parse`] is the way in for a whole frame.

pub mod checksum;
pub mod datagram;
pub mod ethernet;
pub mod ipv6;
pub mod mld;
pub mod neighbour;
pub mod signalling;
pub mod udp;

#[cfg(test)]
mod tests;
