//! The program `migkick` as a library, for its tests.
//!
//! | module | contents |
//! |---|---|
//! | [`cli`] | command line |
//! | `client` | client of the signalling, without I/O |
//! | `session` | I/O of the client: sockets, clock, idle NIC |
//! | `net` | UDP sockets |
//! | [`interface`] | the VM's NICs |
//! | `nic`, `identifier` | configuration of the idle NIC |
//! | `mobile` | migration of a VM that runs a node |
//! | `node` | unicast mobility: `migkick node` |
//! | [`datapath`] | kernel programs of MAT, their maps, and `mat0` |
//! | `view` | output for the user |
//! | `fuzz` | properties that hold for any input, for tests |

pub mod cli;
mod client;
pub mod datapath;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod identifier;
pub mod interface;
mod mobile;
mod net;
mod nic;
mod node;
mod session;
#[cfg(test)]
mod testing;
mod view;

pub(crate) use cli::GoArgs;
