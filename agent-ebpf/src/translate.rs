//! Translates unicast packets that an arrived VM still sends from an address that the VM has left:
//! the packets leave from the VM's address on this link. The mirror of [`crate::forward`].
//!
//! ```text
//!  frame --> TRANSLATIONS --> in time? --> hop limit --> route --> other source, sent by the route
//! ```
//!
//! The packets address a router of the former link, and their route is not known in advance. The
//! kernel therefore looks up the next hop, and queues packets until neighbour discovery resolves it.

#![allow(unsafe_code, reason = "map values are reached through raw pointers")]

use agent_ebpf::route::{LOOPBACK, NoRoute, Route};
use agent_ebpf::skb::{Skb, now_ns};
use agent_ebpf::verdict::Verdict;
use aya_ebpf::helpers::bpf_redirect_neigh;
use common::counter::Counter;
use common::forward;
use common::maps::Translation;
use common::packet::PacketRead as _;
use common::trace::{Decision, Program, Reason};
use common::wire::{ethernet, ipv6};

use crate::context::{self, Packet as _};
use crate::forward::{ChecksumFixup, EntryCounters, reason};
use crate::header_view::{self, HeaderView, TranslationWords};
use crate::maps::TRANSLATIONS;
use crate::trace::Traced as _;

/// Translates a unicast packet with an entry in `TRANSLATIONS`. Passes all other packets.
#[inline(never)]
pub(crate) fn unicast(skb: &Skb, headers: HeaderView) -> Verdict {
    let vlan = skb.vlan_metadata() & ethernet::VLAN_IDENTIFIER;
    let key = TranslationWords::new(headers.source(), skb.ifindex(), vlan);
    let Some(entry) = TRANSLATIONS.get_ptr_mut(key.key()) else {
        return Verdict::Pass;
    };
    // SAFETY: the pointer refers to a live map value; what is written to it below is not read here.
    let translation = unsafe { &*entry };
    let header = headers.header();
    if translation.until_ns <= now_ns()
        || forward::stays(header)
        || ipv6::is_link_local(&header.destination)
    {
        return Verdict::Pass;
    }
    let amount = [skb.segments().into(), skb.len() as u64];
    let sent = send(skb, headers, translation);
    if let Err(reason) = sent {
        skb.tell(Program::Snoop, Decision::Dropped, reason, 0);
    }
    // SAFETY: the pointer refers to a live map value.
    unsafe {
        let counters = EntryCounters {
            packets: &raw mut (*entry).packets,
            bytes: &raw mut (*entry).bytes,
            dropped: &raw mut (*entry).dropped,
        };
        counters.count(sent, Counter::TranslatedPackets, amount)
    }
}

#[inline(always)]
fn send(skb: &Skb, mut headers: HeaderView, translation: &Translation) -> Result<Verdict, Counter> {
    let fixup = ChecksumFixup::new(headers, translation.difference)?;
    let mut route = Route::new(
        LOOPBACK,
        fixup.next_header,
        skb.wire_bytes(),
        translation.source,
        header_view::address(headers.destination()),
    );
    match route.look_up(skb.context()) {
        Ok(()) | Err(NoRoute::Neighbour) => {}
        Err(no_route) => return Err(reason(no_route)),
    }
    // Before the rewrite: the packet still shows its original source.
    skb.tell(Program::Snoop, Decision::Translated, Reason::NONE, 0);
    forward::send_from(&mut headers, &translation.source, fixup.hop_limit);
    context::fix_checksums(skb, &fixup);
    // SAFETY: without parameters the helper looks up the next hop.
    unsafe { bpf_redirect_neigh(route.ifindex, core::ptr::null_mut(), 0, 0) };
    Ok(Verdict::Redirect)
}
