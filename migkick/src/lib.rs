//! The program `migkick`, as a library for tests.
//!
//! | module | holds |
//! |---|---|
//! | [`cli`] | the command line |
//! | `client` | the signalling, without I/O |
//! | `session` | drives the client: sockets, clock, idle NIC |
//! | `net` | UDP sockets |
//! | [`interface`] | the VM's NICs |
//! | `nic`, `identifier` | preparing the idle NIC |
//! | `mobile` | a move of a VM that runs a node |
//! | `node` | the mobile address: `migkick node` |
//! | [`datapath`] | the kernel programs of MAT, their maps, and `mat0` |
//! | `view` | what is shown |
//! | `fuzz` | what must hold for any bytes, for tests |

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
