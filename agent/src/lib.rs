//! The daemon of Roamcast and the operator's commands.
//!
//! | module | holds |
//! |---|---|
//! | [`proto`] | the protocol, without I/O |
//! | [`datapath`] | kernel programs and maps (aya) |
//! | [`hypervisor`] | domains and live migration (libvirt) |
//! | [`hook`] | libvirt's hook, for migrations that others start |
//! | [`net`] | sockets, netlink, TLS |
//! | [`pki`] | small CAs for operators without a PKI |
//! | [`role`] | the role in a certificate, and the messages that each role may send |
//! | [`control`] | the operator's socket |
//! | [`cli`] | the command line |
//! | [`config`], [`credentials`] | configuration files, and files that systemd reads for a role |
//! | [`value`], [`glob`] | names, prefixes, addresses of peers, timestamps; patterns for names |
//! | [`clock`], [`job`] | the kernel's clock, blocking work |
//! | [`runtime`] | the running agent: connects all of these |
//! | [`telemetry`], [`shutdown`], [`watchdog`] | logs, signals, systemd's watchdog |
//! | [`allocator`] | tuning of the C library's allocator |
//! | `fuzz` | fuzz targets |
//!
//! The features `agent`, `relay`, `mcs` and `ims` choose the roles of a build; all are on by default. Tests
//! need all.

#![cfg_attr(
    not(all(feature = "agent", feature = "relay", feature = "mcs", feature = "ims")),
    allow(
        dead_code,
        unreachable_pub,
        reason = "the code that roles share is whole in every build"
    )
)]

pub mod allocator;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod credentials;
#[cfg(feature = "programs")]
pub mod datapath;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod glob;
#[cfg(feature = "agent")]
pub mod hook;
#[cfg(feature = "agent")]
pub mod hypervisor;
pub mod job;
pub mod net;
pub mod pki;
pub mod proto;
pub mod role;
pub mod runtime;
pub mod shutdown;
pub mod telemetry;
pub mod value;
pub mod watchdog;
