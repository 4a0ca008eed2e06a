//! Tracing of decisions for `roamcast trace`, in the object built with feature `trace`.
//!
//! ```text
//!  decision --> TRACE_FILTER? --> budget in TRACE_CPU? --> TRACE
//! ```
//!
//! Without the feature every function is empty, and the compiler removes the calls.

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
use crate::header_view::StreamWords;

/// A frame whose decisions can be traced.
pub(crate) trait Traced {
    /// Traces a decision about the frame in its current state. `number` is 0 for none.
    fn tell(&self, program: Program, decision: Decision, reason: impl Into<Reason>, number: u64);

    /// Traces a decision about a frame that does not show its multicast flow.
    ///
    /// # Safety
    ///
    /// `stream` points into a map value or the program's stack.
    unsafe fn tell_of(
        &self,
        stream: *const StreamKey,
        program: Program,
        decision: Decision,
        reason: impl Into<Reason>,
        number: u64,
    );

    /// Traces a decision about a frame whose flow was [kept](keep).
    fn tell_of_kept(
        &self,
        program: Program,
        decision: Decision,
        reason: impl Into<Reason>,
        number: u64,
    );
}

/// Keeps a flow in a map for the rest of the program run.
#[inline(always)]
pub(crate) fn keep(stream: &StreamWords) {
    #[cfg(feature = "trace")]
    record::keep(stream);
    #[cfg(not(feature = "trace"))]
    let _ = stream;
}

/// Packs program, decision and reason into the low bytes of a word.
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
