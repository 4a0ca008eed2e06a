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
//! Where something cannot be known, a packet comes twice rather than not at all.
//!
//! # Driving it
//!
//! No I/O and no clock is here: the thread that drives it reads counters and maps, and sends frames.
//! It is not part of [`super::Agent`], because it has a cut to make in milliseconds.
//!
//! *Source.* With the recording begins [`Placement::new`]. From then on, do what
//! [`Placement::poll`] says: call [`Placement::read_by`] and take a sample at its time. When the hypervisor reports the stop, call
//! [`Placement::stopped`], take a sample, send a frame into the TAP past the gate, and call
//! [`Placement::injected`] if the TAP took it; one for each queue, and [`Placement::probed`]. When `poll` gives the cut, read `DELIVERED`, then the
//! slot of `GATE_RECORDS`, which must have been cleared before the recording; make [`nic_cut`], and
//! send it.
//!
//! *Destination.* [`Hold::push`] every frame of `HELD` from the beginning on, and show every time
//! stamp of the source to a [`ClockOffset`]. With the message, empty `HELD`, call [`Hold::cut`], and
//! set [`common::maps::Gate::replayed`] to [`Hold::done`]. Then send [`Hold::next_replay`] for as long
//! as [`Pace`] allows it and the TAP takes it, go on to `push` what comes, and publish `done` whenever it changes.
//! [`Hold::drained`] passes over numbers for which `HELD` had no room. If no cut comes,
//! [`Hold::cut_blind`]; if the migration fails, [`Hold::forget`].
//!
//! # Limits
//!
//! By time are placed: flows without a packet that both ends have once, such as those of one and the
//! same payload; packets that one path alters, or aggregates otherwise than the other; and a
//! destination that has held nothing yet of what the source tells of. It may then replay again what
//! has come in some milliseconds, or in its lag behind the source.
//!
//! Of a TAP of several queues the cut is exact if all that came since they were last found empty, some
//! milliseconds before the stop, is of one flow; else it is too early, by so much at most.
//!
//! Not found out is a stream that repeats itself as a whole within the time that frames are held. A second frame that QEMU takes
//! and does not hand over is a probe ([`common::handover::PROBE_MAC`]), unless two processors send into
//! the TAP in that very moment.
//!
//! | module | holds |
//! |---|---|
//! | `placement`, `evidence`, `cut` | source: the number of the last frame that the guest has had |
//! | `records` | source: what was had of each flow |
//! | `hold` | destination: held frames, and those that wait for the TAP |
//! | `judge`, `matching` | destination: which of them the guest has had, by time and by fingerprint |
//! | `pace` | destination: how fast they are put into the TAP |
//! | `flows`, `report` | what became of them, by flow |
//! | `clock` | the difference of the two ends' clocks |
//! | `since_first` | counters that began before the handover |
//! | `unread`, `readdress` | source: what had not been read at the stop, for the address that the VM has now |
//! | `flow`, `tag`, `upper` | what a frame is, and how it is made whole |

mod clock;
mod cut;
mod evidence;
mod flow;
mod flows;
#[cfg(any(test, fuzzing))]
pub(super) mod fuzz;
mod hold;
mod judge;
mod matching;
mod pace;
mod placement;
mod readdress;
mod records;
mod report;
#[cfg(any(test, fuzzing))]
mod sample;
mod since_first;
mod tag;
#[cfg(test)]
mod tests;
mod unread;
mod upper;

pub use clock::ClockOffset;
pub use cut::Cut;
pub use evidence::Counts;
pub use flow::{Flow, flow_of};
pub use hold::{Hold, HoldLimits, Replay};
pub use judge::MARGIN;
pub use pace::Pace;
pub use placement::{LATEST_CUT, Path, Placement, Reader, Step};
pub use records::{NicReach, Reading, nic_cut};
pub use report::{FlowReport, HoldReport, Placed};
pub use since_first::SinceFirst;
pub use unread::{Unread, UnreadReport, Way};
pub use upper::{finish_checksum, split};
