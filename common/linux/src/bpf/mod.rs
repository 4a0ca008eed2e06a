//! Programs, links and records of BPF that outlive the process that made them, through aya.
//!
//! | module | does |
//! |---|---|
//! | [`pins`] | directories of pins: locked, of one layout, removed |
//! | [`link`] | attaches programs by pinned links, and exchanges the program in one |
//! | [`record`] | reads records of ring buffers |
//! | [`sys`] | `bpf(2)` itself |

pub mod link;
pub mod pins;
pub mod record;
pub mod sys;

pub use sys::has_tcx;
