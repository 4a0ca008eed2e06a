//! `leak`: drops restored packets that leave this host by a port that is not a VM's.

#![allow(unsafe_code, reason = "the frame is reached through a raw pointer")]

use agent_ebpf::skb::Skb;
use agent_ebpf::verdict::Verdict;
use common::counter::Counter;
use common::relay;
use common::trace::{Decision, Program};

use crate::maps;
use crate::trace::Traced as _;

/// Destination and source MAC, bytes.
const BYTES: usize = 12;

#[inline(always)]
pub(crate) fn leak(skb: &Skb) -> Verdict {
    let Some(start) = skb.start::<BYTES>() else {
        return Verdict::Pass;
    };
    // SAFETY: `start` checked that the frame has `BYTES` bytes.
    let macs = unsafe { start.cast::<[[u8; 6]; 2]>().read() };
    let [destination_mac, source_mac] = macs;
    if relay::is_restored(destination_mac, source_mac) {
        maps::count(Counter::RelayLeaks, 1);
        skb.tell(Program::Leak, Decision::Dropped, Counter::RelayLeaks, 0);
        return Verdict::Drop;
    }
    Verdict::Pass
}
