//! The daemon of Roamcast and the operator's commands.
//!
//! | module | holds |
//! |---|---|
//! | [`proto`] | the protocol, without I/O |
//! | [`datapath`] | kernel programs and maps (aya) |
//! | [`hypervisor`] | domains and live migration (libvirt) |
//! | [`hook`] | libvirt's hook, for moves that others ask for |
//! | [`net`] | sockets, netlink, TLS |
//! | [`pki`] | small CAs for those who have none |
//! | [`role`] | what somebody on the signalling is by the certificate, and may send |
//! | [`control`] | the operator's socket |
//! | [`cli`] | the command line |
//! | [`config`], [`credentials`] | the agent's configuration, files that systemd has read for it |
//! | [`glob`], [`clock`], [`job`] | patterns for names, the kernel's clock, work that blocks |
//! | [`runtime`] | the running agent: connects all of these |
//! | [`telemetry`], [`shutdown`], [`watchdog`] | logs, signals, systemd's watchdog |
//! | [`allocator`] | the C library's memory |
//! | `fuzz` | what must hold for any bytes, for tests |

pub mod allocator;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod credentials;
pub mod datapath;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod glob;
pub mod hook;
pub mod hypervisor;
pub mod job;
pub mod net;
pub mod pki;
pub mod proto;
pub mod role;
pub mod runtime;
pub mod shutdown;
pub mod telemetry;
pub mod watchdog;
