//! GSO frames on their way into a TAP.
//!
//! A TAP with the offload takes a GSO frame whole. For a TAP without the offload the kernel
//! segments the frame after `gate`, and the TAP's statistics count the segments.

use common::forward::TCP;
use common::maps::Gate;
use common::packet::PacketRead as _;
use common::wire::{ethernet, ipv6, udp};

use agent_ebpf::skb::Skb;

/// Offset of the protocol in an IPv4 header, bytes (RFC 791 §3.1).
const IPV4_PROTOCOL: usize = 9;
/// Offset of the next header in an IPv6 header, bytes (RFC 8200 §3).
const IPV6_NEXT_HEADER: usize = 6;
/// Offset of the data offset in a TCP header, bytes (RFC 9293 §3.1).
const TCP_DATA_OFFSET: usize = 12;

/// What a GSO frame contains.
struct Kind {
    /// Flag of this kind in [`Gate::splits`].
    flag: u32,
    /// Headers of each segment, bytes.
    header_bytes: usize,
}

/// Returns how many frames the TAP receives for `skb`. `splits` names the kinds that the kernel
/// segments for this TAP ([`Gate::splits`]).
#[inline(always)]
pub(crate) fn frames(skb: &Skb, splits: u32) -> u64 {
    if skb.segment_bytes() == 0 || splits == 0 {
        return 1;
    }
    split(skb, splits)
}

#[inline(never)]
fn split(skb: &Skb, splits: u32) -> u64 {
    let Some(kind) = kind(skb) else {
        return u64::from(skb.segments());
    };
    if splits & kind.flag == 0 {
        return 1;
    }
    u64::from(skb.segments_behind(kind.header_bytes))
}

/// Returns `None` for a transport that is neither TCP nor UDP.
#[inline(always)]
fn kind(skb: &Skb) -> Option<Kind> {
    let ether_type = skb.protocol() as u16;
    let (protocol_at, network_bytes, tcp) = if ether_type == ethernet::IPV6.to_be() {
        (IPV6_NEXT_HEADER, ipv6::HEADER_BYTES, Gate::SPLITS_TCP6)
    } else if ether_type == ethernet::IPV4.to_be() {
        let [first] = skb.read(ethernet::HEADER_BYTES).ok()?;
        let words = usize::from(first & 0x0f);
        (IPV4_PROTOCOL, words * 4, Gate::SPLITS_TCP4)
    } else {
        return None;
    };
    let [protocol] = skb.read(ethernet::HEADER_BYTES + protocol_at).ok()?;
    let transport = ethernet::HEADER_BYTES + network_bytes;
    match protocol {
        TCP => {
            let [offset] = skb.read(transport + TCP_DATA_OFFSET).ok()?;
            Some(Kind {
                flag: tcp,
                header_bytes: transport + usize::from(offset >> 4) * 4,
            })
        }
        udp::NEXT_HEADER => Some(Kind {
            flag: Gate::SPLITS_UDP,
            header_bytes: transport + udp::HEADER_BYTES,
        }),
        _ => None,
    }
}
