//! eBPF programs, links and records that outlive the process that created them, through aya.
//!
//! | module | does |
//! |---|---|
//! | [`pins`] | locks directories of pins, removes pins and other layouts |
//! | [`link`] | attaches programs by pinned links, and replaces the program in a link |
//! | [`refusal`](mod@refusal) | says what the kernel refused, and why |
//! | [`record`] | reads records of ring buffers |
//! | [`sys`] | calls `bpf(2)` |

pub mod link;
pub mod pins;
pub mod record;
pub mod refusal;
pub mod sys;

pub use sys::has_tcx;
