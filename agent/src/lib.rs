//! The daemon of Roamcast and the operator's commands.
//!
//! | module | holds |
//! |---|---|
//! | [`proto`] | the protocol, without I/O |
//! | [`datapath`] | kernel programs and maps (aya) |
//! | [`hypervisor`] | domains and live migration (libvirt) |
//! | [`net`] | sockets, netlink, TLS |
//! | [`control`] | the operator's socket |

pub mod control;
pub mod datapath;
pub mod hypervisor;
pub mod net;
pub mod proto;
