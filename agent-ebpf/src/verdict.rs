//! Verdicts of the programs, and their TC return codes.

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC};

/// What happens to the frame. `Pass` is `TC_ACT_UNSPEC`, so later programs on the hook still decide
/// (`TCX_NEXT` on TCX, "continue" on clsact).
#[derive(Clone, Copy)]
pub enum Verdict {
    /// The frame continues.
    Pass,
    /// The frame ends here (`TC_ACT_SHOT`, `XDP_DROP`).
    Drop,
    /// The frame goes to the interface that the program passed to `bpf_redirect`.
    Redirect,
    /// The frame leaves by its ingress interface (`XDP_TX`). XDP only; TC drops the frame.
    Back,
}

impl From<Verdict> for i32 {
    fn from(verdict: Verdict) -> Self {
        match verdict {
            Verdict::Pass => TC_ACT_UNSPEC,
            Verdict::Drop | Verdict::Back => TC_ACT_SHOT as Self,
            Verdict::Redirect => TC_ACT_REDIRECT as Self,
        }
    }
}
