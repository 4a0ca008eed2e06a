//! Sockets, netlink and TLS.
//!
//! | module | does |
//! |---|---|
//! | [`links`] | watches the ports of the managed bridge |
//! | [`addresses`] | finds the addresses of the bridge |
//! | [`mdb`] | writes the bridge's multicast database |
//! | [`membership`] | holds memberships on the bridge through kernel sockets |
//! | [`vm_socket`] | exchanges datagrams with the VMs |
//! | [`peers`] | connections to the agents of other hosts |
//! | [`tls`] | their certificates |

pub mod addresses;
mod frames;
pub mod links;
mod mcast_filter;
pub mod mdb;
pub mod membership;
mod netlink;
pub mod peers;
mod rcvmark;
pub mod tls;
pub mod vm_socket;
