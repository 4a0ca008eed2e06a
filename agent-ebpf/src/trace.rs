//! What the programs tell `roamcast trace`, in the object that is built with feature `trace`.
//!
//! ```text
//!  decision --> TRACE_FILTER? --> TRACE_BUDGET? --> TRACE
//! ```
//!
//! In the other object every function here is empty, and nothing is left of the calls.

#![allow(
    unsafe_code,
    reason = "packets, map values and records are reached through raw pointers"
)]

use agent_ebpf::skb::Skb;
use common::maps::StreamKey;
use common::trace::{Decision, Program, Reason};

#[cfg(feature = "trace")]
use crate::context::Packet as _;
use crate::context::Xdp;
use crate::front::StreamWords;

/// A frame whose decisions are told.
pub(crate) trait Traced {
    /// Tells what becomes of the frame, as it is now. `number` is 0 for none.
    fn tell(&self, program: Program, decision: Decision, reason: impl Into<Reason>, number: u64);

    /// The same of a frame that does not show its multicast flow.
    ///
    /// # Safety
    ///
    /// `stream` is in a map value, or on the stack of the program.
    unsafe fn tell_of(
        &self,
        stream: *const StreamKey,
        program: Program,
        decision: Decision,
        reason: impl Into<Reason>,
        number: u64,
    );

    /// The same of a frame whose flow was [kept](keep).
    fn tell_of_kept(
        &self,
        program: Program,
        decision: Decision,
        reason: impl Into<Reason>,
        number: u64,
    );
}

/// Keeps a flow for the rest of the program, off the stack.
#[inline(always)]
pub(crate) fn keep(stream: &StreamWords) {
    #[cfg(feature = "trace")]
    record::keep(stream);
    #[cfg(not(feature = "trace"))]
    let _ = stream;
}

/// What is told, in one word: the low bytes are the program, the decision and the reason.
#[cfg(feature = "trace")]
#[inline(always)]
const fn word(program: Program, decision: Decision, reason: Reason) -> u64 {
    program as u64 | (decision as u64) << 8 | (reason.number() as u64) << 16
}

macro_rules! traced {
    ($packet:ty, $record:path) => {
        impl Traced for $packet {
            #[inline(always)]
            fn tell(
                &self,
                program: Program,
                decision: Decision,
                reason: impl Into<Reason>,
                number: u64,
            ) {
                #[cfg(feature = "trace")]
                $record(
                    self.context().cast(),
                    word(program, decision, reason.into()),
                    number,
                    core::ptr::null(),
                );
                #[cfg(not(feature = "trace"))]
                let _ = (program, decision, reason, number);
            }

            #[inline(always)]
            unsafe fn tell_of(
                &self,
                stream: *const StreamKey,
                program: Program,
                decision: Decision,
                reason: impl Into<Reason>,
                number: u64,
            ) {
                #[cfg(feature = "trace")]
                $record(
                    self.context().cast(),
                    word(program, decision, reason.into()),
                    number,
                    stream,
                );
                #[cfg(not(feature = "trace"))]
                let _ = (stream, program, decision, reason, number);
            }

            #[inline(always)]
            fn tell_of_kept(
                &self,
                program: Program,
                decision: Decision,
                reason: impl Into<Reason>,
                number: u64,
            ) {
                #[cfg(feature = "trace")]
                $record(
                    self.context().cast(),
                    word(program, decision, reason.into()) | record::KEPT,
                    number,
                    core::ptr::null(),
                );
                #[cfg(not(feature = "trace"))]
                let _ = (program, decision, reason, number);
            }
        }
    };
}

traced!(Skb, record::skb);
traced!(Xdp, record::xdp);

#[cfg(feature = "trace")]
mod record;
