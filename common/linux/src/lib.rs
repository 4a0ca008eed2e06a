//! What the programs of Roamcast ask of a Linux host.
//!
//! | module | does |
//! |---|---|
//! | [`bpf`] | pins, links and records of kernel programs |
//! | [`interface`] | interfaces with their addresses and routes |
//! | [`netlink`] | requests to the kernel's routing tables and links, and notices of changes |
//! | [`packet_socket`] | sends and receives frames of one interface |
//! | [`multicast`] | joins multicast addresses from some sources |
//! | [`random`] | random numbers |
//! | [`socket_option`] | sets what the socket crates do not |

#[cfg(feature = "bpf")]
pub mod bpf;
pub mod interface;
pub mod multicast;
pub mod netlink;
pub mod packet_socket;
pub mod random;
pub mod socket_option;
