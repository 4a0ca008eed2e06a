//! Unicast packets that a VM which has arrived here still sends from an address that it has left: sent
//! from the one that it has here. The mirror of [`crate::forward`].
//!
//! ```text
//!  frame --> TRANSLATIONS --> in time? --> hop limit --> route --> other source, sent by the route
//! ```
//!
//! They are for a router that is not on this link. Where they go is not known before, so the next hop
//! is looked up by the kernel, which keeps packets until it is known.

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
use crate::forward::{Follow, Sums, reason};
use crate::front::{self, Front, TranslationWords};
use crate::maps::TRANSLATIONS;
use crate::trace::Traced as _;

/// A unicast packet. Passes if it is none of these.
#[inline(never)]
pub(crate) fn unicast(skb: &Skb, front: Front) -> Verdict {
    let vlan = skb.vlan_metadata() & ethernet::VLAN_IDENTIFIER;
    let key = TranslationWords::new(front.source(), skb.ifindex(), vlan);
    let Some(entry) = TRANSLATIONS.get_ptr_mut(key.key()) else {
        return Verdict::Pass;
    };
    // SAFETY: the pointer is to a live map value; what is written to it below is not read here.
    let translation = unsafe { &*entry };
    let header = front.header();
    if translation.until_ns <= now_ns()
        || forward::stays(header)
        || ipv6::is_link_local(&header.destination)
    {
        return Verdict::Pass;
    }
    let amount = [skb.segments().into(), skb.len() as u64];
    let sent = send(skb, front, translation);
    if let Err(reason) = sent {
        skb.tell(Program::Snoop, Decision::Dropped, reason, 0);
    }
    // SAFETY: the pointer is to a live map value.
    unsafe {
        let sums = Sums {
            packets: &raw mut (*entry).packets,
            bytes: &raw mut (*entry).bytes,
            dropped: &raw mut (*entry).dropped,
        };
        sums.count(sent, Counter::TranslatedPackets, amount)
    }
}

#[inline(always)]
fn send(skb: &Skb, mut front: Front, translation: &Translation) -> Result<Verdict, Counter> {
    let follow = Follow::new(front, translation.difference)?;
    let mut route = Route::new(
        LOOPBACK,
        follow.next_header,
        skb.wire_bytes(),
        translation.source,
        front::address(front.destination()),
    );
    match route.look_up(skb.context()) {
        Ok(()) | Err(NoRoute::Neighbour) => {}
        Err(no_route) => return Err(reason(no_route)),
    }
    // Now, as the packet still shows the address that it was sent from.
    skb.tell(Program::Snoop, Decision::Translated, Reason::NONE, 0);
    forward::send_from(&mut front, &translation.source, follow.hop_limit);
    context::follow(skb, &follow);
    // SAFETY: without parameters the helper looks the next hop up.
    unsafe { bpf_redirect_neigh(route.ifindex, core::ptr::null_mut(), 0, 0) };
    Ok(Verdict::Redirect)
}
