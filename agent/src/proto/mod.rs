//! The agent's protocol without I/O: no clock, no socket, no BPF map, no libvirt below this module.
//!
//! [`Agent`] takes inputs by `handle_*` methods and gives [`Output`]s, BPF-map writes included,
//! from [`Agent::poll_output`]. The order for the caller is: one `handle_*`, then `poll_output`
//! until it is empty, then sleep until [`Agent::poll_timeout`] or the next input. Extra calls of
//! `handle_timeout` do nothing.
//!
//! Time is [`Timestamp`], nanoseconds of the clock that the kernel programs stamp with, so a
//! packet's time and a timer's compare.

mod io;

pub use io::*;
