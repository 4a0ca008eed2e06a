//! Byte layouts and packet rules of Roamcast.
//!
//! The kernel programs, the agent and `migkick` share this crate. The crate does no I/O and, without
//! the `user` feature, allocates nothing, so the same function runs in the kernel and in
//! `cargo test`.
//!
//! # Layout
//!
//! | module | contents | used by |
//! |---|---|---|
//! | [`packet`] | the trait through which every parser reads a packet | all |
//! | [`wire`] | Ethernet, IPv6, UDP, MLD and checksum rules | all |
//! | [`group`] | scope, range and Ethernet destination of a multicast address | all |
//! | [`snoop`] | the effect of an MLD message on the listener tables | kernel, agent |
//! | [`relay`] | rewrites between multicast and relayed unicast; detection of second copies | kernel, agent, relay |
//! | [`mat`] | unicast mobility: addresses, keys and messages | kernel, IMS, `migkick` |
//! | [`maps`] | keys and values of the BPF maps | kernel, agent |
//! | [`handover`] | identification of packets at both ends of a migration | kernel, agent |
//! | [`forward`] | packets for an address that a VM has left | kernel, agent |
//! | [`trace`] | records of the kernel programs' decisions | kernel, agent |
//! | [`event`] | ring buffer records, kernel to agent | kernel, agent |
//! | [`text`] | escaping of foreign text for display | agent, `migkick` |
//! | [`counter`] | the names of all counters | kernel, agent |
//! | [`rate`] | token buckets | kernel, agent, `migkick` |
//! | [`backoff`] | delays that double | agent, `migkick` |
//! | [`heartbeat`] | timing of watchdog notifications | agent, `migkick` |
//! | `signal` | signalling messages (feature `user`) | agent, `migkick` |
//! | `fuzz` | properties that hold for any input | tests |
//! | `testing` | frames and listener tables that tests share (feature `testing`) | tests |

#![no_std]

#[cfg(feature = "user")]
extern crate alloc;
#[cfg(any(test, fuzzing, feature = "testing"))]
extern crate std;

pub mod backoff;
pub mod counter;
pub mod event;
pub mod forward;
#[cfg(all(feature = "user", any(test, fuzzing)))]
pub mod fuzz;
pub mod group;
pub mod handover;
mod hash;
pub mod heartbeat;
pub mod maps;
pub mod mat;
pub mod packet;
pub mod rate;
pub mod reads;
pub mod relay;
#[cfg(feature = "user")]
pub mod signal;
pub mod snoop;
#[cfg(any(test, fuzzing, feature = "testing"))]
pub mod testing;
pub mod text;
pub mod trace;
pub mod wire;
