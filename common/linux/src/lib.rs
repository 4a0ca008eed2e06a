//! Access to the Linux kernel that Roamcast's programs share.
//!
//! | module | does |
//! |---|---|
//! | [`bpf`] | pins, links and ring buffer records of eBPF programs |
//! | [`interface`] | reads interfaces with their addresses and routes |
//! | [`netlink`] | sends rtnetlink requests, and receives notices of changes |
//! | [`packet_socket`] | sends and receives frames of one interface |
//! | [`multicast`] | joins multicast addresses with source filters |
//! | [`random`] | returns random numbers of the kernel |
//! | [`socket_option`] | sets socket options that the socket crates lack |

#[cfg(feature = "bpf")]
pub mod bpf;
pub mod interface;
pub mod multicast;
pub mod netlink;
pub mod packet_socket;
pub mod random;
pub mod socket_option;
