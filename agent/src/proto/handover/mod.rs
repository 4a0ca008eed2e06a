//! Handover of a VM's reception: every packet exactly once, at either end of the migration.
//!
//! The guest receives at the source host until the stop, and at the destination host from the resume
//! on. Neither end sees these moments in its frames. The source host's TAP still holds frames that
//! nobody reads, and the destination host's TAP receives frames from the start. So the source host
//! counts the frames read from its TAP, and reports which packets were read. The destination host holds
//! all frames, drops the reported packets and replays the rest.
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
//! If the facts are uncertain, a packet arrives twice rather than not at all.
//!
//! # Driving it
//!
//! This module has no I/O and no clock. The driving thread reads counters and maps, and sends frames.
//! The thread is separate from [`super::Agent`], because the cut is due within milliseconds.
//!
//! *Source.* [`Placement::new`] starts with the recording. From then on, follow [`Placement::poll`]:
//! call [`Placement::read_by`] and take a sample at the given time. When the hypervisor reports the
//! stop, call [`Placement::stopped`] and take a sample. Then send a frame into the TAP past the gate
//! and call [`Placement::injected`] if the TAP took the frame; do this once per queue, then call
//! [`Placement::probed`]. When `poll` returns the cut, read `DELIVERED`, then the slot of
//! `GATE_RECORDS`, which must have been cleared before the recording. Build the message with
//! [`nic_cut`] and send the message.
//!
//! *Destination.* [`Hold::push`] every frame of `HELD` from the start, and pass every time stamp of the
//! source host to a [`ClockOffset`]. When the message arrives, empty `HELD`, call [`Hold::cut`], and
//! set [`common::maps::Gate::replayed`] to [`Hold::done`]. Then send [`Hold::next_replay`] while
//! [`Pace`] allows and the TAP accepts frames. Meanwhile continue to `push` new frames, pass the gate's
//! counts to [`Hold::counted`], and publish `done` after every change. If no cut arrives, call
//! [`Hold::cut_blind`]; if the migration fails, call [`Hold::forget`].
//!
//! # Limits
//!
//! Some flows are placed by time only: flows without a packet that occurs once at both ends, such as
//! flows with one constant payload; packets that one path alters, or aggregates differently from the
//! other; and a destination host that holds none of the reported packets yet. The destination host may
//! then replay packets of some milliseconds, or of its lag behind the source host, a second time.
//!
//! For a TAP with several queues, the cut is exact if all frames since the queues were last found
//! empty, some milliseconds before the stop, belong to one flow. Otherwise the cut is too early, by
//! these frames at most.
//!
//! A stream that repeats itself entirely within the hold time goes undetected. A second frame that QEMU
//! takes and does not deliver is a probe ([`common::handover::PROBE_MAC`]), unless two processors send
//! into the TAP at the same moment.
//!
//! | module | holds |
//! |---|---|
//! | `placement`, `evidence`, `cut` | source: number of the last frame that the guest received |
//! | `records` | source: received packets of each flow |
//! | `hold` | destination: held frames, and packets waiting for the TAP |
//! | `judge`, `matching` | destination: which held packets the guest received, by time and by fingerprint |
//! | `pace` | destination: rate of frames into the TAP |
//! | `flows`, `report` | result of the handover, by flow |
//! | `clock` | difference of the two ends' clocks |
//! | `since_first` | counters that started before the handover |
//! | `unread`, `readdress` | source: frames unread at the stop, for the VM's new address |
//! | `flow`, `tag`, `upper` | parsing and completion of a frame |

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
