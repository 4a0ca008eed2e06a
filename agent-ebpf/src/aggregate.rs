//! Aggregates (GSO): frames that stand for several packets, on their way into a TAP.
//!
//! A TAP that takes them whole gets one frame. For any other the kernel makes packets of them behind
//! `gate`, and the TAP's counters count those.

use common::forward::TCP;
use common::maps::Gate;
use common::packet::PacketRead as _;
use common::wire::{ethernet, ipv6, udp};

use agent_ebpf::skb::Skb;

/// Where the protocol stands in an IPv4 header, bytes (RFC 791 §3.1).
const IPV4_PROTOCOL: usize = 9;
/// Where the next header stands in an IPv6 header, bytes (RFC 8200 §3).
const IPV6_NEXT_HEADER: usize = 6;
/// Where the data offset stands in a TCP header, bytes (RFC 9293 §3.1).
const TCP_DATA_OFFSET: usize = 12;

/// What is aggregated.
struct Kind {
    /// The flag of [`Gate::splits`].
    flag: u32,
    /// Headers of each packet, bytes.
    header_bytes: usize,
}

/// Frames that a TAP gets of a frame, if it splits those of some kinds ([`Gate::splits`]).
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

/// `None` for what is not known.
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
