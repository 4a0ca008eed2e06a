//! Wire formats of Ethernet, IPv6, UDP, MLD and Neighbor Discovery, and the classification of
//! signalling packets.
//!
//! Every parser here reads through [`crate::packet::PacketRead`], never panics, allocates nothing,
//! and has loops with constant bounds, so that the kernel's verifier accepts the parser.
//! [`mld::parse`] is the entry point for a whole frame.

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
