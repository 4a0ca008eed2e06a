//! The handover of a VM's reception: every packet once, on whichever side of the migration.
//!
//! The guest receives at the source until it stops, and at the destination from when it resumes.
//! Neither end knows when: the source's TAP holds frames that nobody reads any more, and the
//! destination's fills up from the start. So the source counts what was read from its TAP, and says
//! which packets these were; the destination holds everything back, and lets go what is not among
//! them.
//!
//! ```text
//!  source                                                 destination
//!
//!  gate numbers and records        stream                 gate holds
//!        |             <----------------------------->          | HELD
//!        v                                                      v
//!  Placement: which frame was                             Hold: ring of frames
//!  the last one read?                                           |
//!        | number                                               |
//!        v                         HandoverCut                  v
//!  nic_cut: its packets, by flow  ---------------->       Judge: had, or not?
//!  (fingerprints)                                               | in order
//!                                                               v
//!                                                         TAP; `done` opens the gate
//! ```
//!
//! No I/O and no clock is here: the thread that drives it reads counters and maps, and sends frames.
//! It is not part of [`super::Agent`], because it has a cut to make in milliseconds.
//!
//! Where something cannot be known, a packet comes twice rather than not at all.
//!
//! Left out: TAPs of several queues, whose frames have no common order; a stream that repeats itself
//! within the time that frames are held; and packets that one path alters, or aggregates otherwise
//! than the other. The latter two are placed by time.
//!
//! | module | holds |
//! |---|---|
//! | `placement` | source: the number of the last frame that the guest has had |
//! | `records` | source: what was had of each flow |
//! | `hold` | destination: held frames, and those that wait for the TAP |
//! | `judge`, `matching` | destination: which of them the guest has had, by time and by fingerprint |
//! | `flows`, `report` | what became of them, by flow |
//! | `clock` | the difference of the two ends' clocks |
//! | `flow`, `checksum` | what a frame is, and how it is made whole |

mod checksum;
mod clock;
mod flow;
mod flows;
mod hold;
mod judge;
mod matching;
mod placement;
mod records;
mod report;
#[cfg(test)]
mod tests;

pub use checksum::{finish_checksum, split};
pub use clock::ClockOffset;
pub use flow::{Flow, flow_of};
pub use hold::{Hold, HoldLimits, Replay};
pub use judge::MARGIN;
pub use placement::{Counts, Cut, Placement, Step};
pub use records::{NicReach, nic_cut};
pub use report::{FlowReport, HoldReport, Placed};
