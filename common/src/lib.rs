//! Every byte layout and every packet rule of Roamcast, once.
//!
//! The kernel programs, the agent and `migkick` share this crate. It does no I/O and, without
//! the `user` feature, allocates nothing, so that one function runs in the kernel and in
//! `cargo test`.
//!
//! # Layout
//!
//! | module | holds | used by |
//! |---|---|---|
//! | [`packet`] | the trait through which every parser reads a packet | all |
//! | [`wire`] | Ethernet, IPv6, UDP, MLD and checksum rules | all |
//! | [`snoop`] | what an MLD message does to the listener tables | kernel, agent |
//! | [`relay`] | how multicast becomes unicast and multicast again, and which copy passes | kernel, agent, relay |
//! | [`mat`] | mobility of unicast: addresses, keys and messages | kernel, IMS, `migkick` |
//! | [`maps`] | keys and values of the BPF maps | kernel, agent |
//! | [`handover`] | how the two ends of a migration tell packets apart | kernel, agent |
//! | [`forward`] | packets for an address that its VM has left | kernel, agent |
//! | [`trace`] | what the kernel programs tell of their decisions | kernel, agent |
//! | [`event`] | ring buffer records, kernel to agent | kernel, agent |
//! | [`text`] | text of others, as it is shown | agent, `migkick` |
//! | [`counter`] | the named reasons behind every counter | kernel, agent |
//! | [`heartbeat`] | when a loop shows that it goes on | agent, `migkick` |
//! | `signal` | signalling messages (feature `user`) | agent, `migkick` |
//! | `fuzz` | what must hold for any bytes | tests |

#![no_std]

#[cfg(feature = "user")]
extern crate alloc;
#[cfg(any(test, fuzzing))]
extern crate self as common;
#[cfg(any(test, fuzzing))]
extern crate std;

pub mod counter;
pub mod event;
pub mod forward;
#[cfg(all(feature = "user", any(test, fuzzing)))]
pub mod fuzz;
pub mod handover;
mod hash;
pub mod heartbeat;
pub mod maps;
pub mod mat;
pub mod packet;
pub mod reads;
pub mod relay;
#[cfg(feature = "user")]
pub mod signal;
pub mod snoop;
pub mod text;
pub mod trace;
pub mod wire;

#[cfg(any(test, fuzzing))]
mod testing;
