//! Sockets, netlink and TLS.
//!
//! | module | does |
//! |---|---|
//! | [`links`] | watches the ports of the managed bridge |
//! | [`addresses`] | finds the addresses of the bridge |
//! | [`mdb`] | writes the bridge's multicast database |
//! | [`fdb`] | writes the bridge's forwarding database |
//! | [`link_addresses`] | asks for, and answers for, unicast addresses of moving VMs |
//! | [`frame_filter`] | chooses the frames that a packet socket receives |
//! | [`membership`] | holds memberships on the bridge through kernel sockets |
//! | [`static_join`] | has the kernel hold joins that outlive the process |
//! | [`fd_store`] | has systemd keep sockets while the process is not there |
//! | [`neighbour`] | has the kernel know the next hops towards agents |
//! | [`tap_queue`] | looks at the queues of TAPs, and sizes them |
//! | [`tc`] | reads and writes qdiscs and filters |
//! | [`tap_socket`] | puts frames into the queue of a TAP |
//! | [`raw_socket`] | sends packets of others on by this host's routes |
//! | [`vm_socket`] | exchanges datagrams with the VMs |
//! | [`xdp`] | tells the XDP program of an interface |
//! | [`peers`] | connections to the agents of other hosts |
//! | [`relays`] | finds relays: listed, by DNS, in session descriptions |
//! | [`tls`] | their certificates |

pub mod addresses;
pub mod fd_store;
pub mod fdb;
pub mod frame_filter;
mod frames;
pub mod link_addresses;
pub mod links;
pub mod mdb;
pub mod membership;
pub mod neighbour;
pub mod peers;
pub mod raw_socket;
#[cfg(feature = "agent")]
pub mod relays;
pub mod snooping;
pub mod static_join;
pub mod tap_queue;
pub mod tap_socket;
pub mod tc;
pub mod tls;
pub mod vm_socket;
pub mod xdp;
