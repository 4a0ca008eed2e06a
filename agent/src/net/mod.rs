//! Sockets, netlink and TLS.

mod frames;
pub mod peers;
mod rcvmark;
pub mod tls;
pub mod vm_socket;
