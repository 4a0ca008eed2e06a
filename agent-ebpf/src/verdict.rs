//! What a program says in the end.

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC};

/// What happens to the frame. Unspecific verdicts let other programs on the hook decide: it is
/// `TCX_NEXT` on TCX and "go on" on clsact.
#[derive(Clone, Copy)]
pub enum Verdict {
    /// It goes on.
    Pass,
    /// It ends here.
    Drop,
    /// It goes where `bpf_redirect` has said.
    Redirect,
    /// It goes out by the interface that it came in by; at XDP only.
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
