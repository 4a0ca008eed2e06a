//! The agent's sockets, netlink requests and TLS connections.
//!
//! | module | does |
//! |---|---|
//! | [`links`] | watches the ports of the managed bridge |
//! | [`addresses`] | reads the addresses of the bridge |
//! | [`mdb`] | writes the bridge's multicast database |
//! | [`fdb`] | writes the bridge's forwarding database |
//! | [`link_addresses`] | probes, hears and advertises unicast addresses of moving VMs (RFC 4861) |
//! | [`frame_filter`] | selects the frames that a packet socket receives |
//! | [`membership`] | holds memberships on the bridge through kernel sockets |
//! | [`static_join`] | has the kernel hold joins that outlive the process |
//! | [`fd_store`] | has systemd keep sockets while the agent is not running |
//! | [`neighbour`] | has the kernel resolve the next hops towards agents |
//! | [`tap_queue`] | reads and sizes the queues of TAPs |
//! | [`tc`] | reads and writes qdiscs and filters |
//! | [`tap_socket`] | puts frames into the queue of a TAP |
//! | [`raw_socket`] | sends complete IPv6 packets by the routes of this host |
//! | [`vm_socket`] | exchanges datagrams with the VMs |
//! | [`xdp`] | reads the XDP program of an interface |
//! | [`peers`] | connects to the agents of other hosts |
//! | [`relays`] | finds relays: listed, by DNS, in session descriptions |
//! | [`tls`] | loads and checks the certificates of these connections |

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
