//! Multicast on `mat0`: MLD leaves by the multicast NIC; streams and Queries arrive by it.

use super::{Action, Decision, Head, ICMPV6, Node, Packet, address};
use crate::group;
use crate::mat::counter::Counter;
use crate::mat::neutral;
use crate::wire::ipv6;

pub(super) const MLD_QUERY: u8 = 130;
const MLD_REPORT_V1: u8 = 131;
const MLD_DONE: u8 = 132;
const MLD_REPORT_V2: u8 = 143;
/// Offset of MLD behind Hop-by-Hop Options of 8 bytes, and of its checksum.
const MLD: usize = 62;
const MLD_CHECKSUM: usize = 64;

/// Decides about a multicast packet of `mat0`: MLD leaves as if the multicast NIC had sent it, from
/// a link-local address of its link (RFC 9777 §5.2.13).
#[inline(always)]
pub(super) fn multicast_out<P: Packet>(packet: &mut P, head: &Head, node: &Node) -> Decision {
    if !matches!(
        mld_type(packet, head),
        MLD_REPORT_V1 | MLD_DONE | MLD_REPORT_V2
    ) {
        return Decision::drop(Counter::OutNotCarried);
    }
    if node.multicast_ifindex == 0 || node.multicast_source == [0; 2] {
        return Decision::drop(Counter::OutMldNoSource);
    }
    let difference = neutral::difference(address(head.source), address(node.multicast_source));
    let written = packet.set_addresses(node.multicast_source, head.destination)
        && packet.set_source_mac(node.multicast_mac)
        && packet.update_checksum(MLD_CHECKSUM, difference, false);
    if written {
        Decision::new(
            Action::Redirect,
            node.multicast_ifindex,
            Some(Counter::OutMld),
        )
    } else {
        Decision::drop(Counter::OutRefusedByKernel)
    }
}

/// Decides about a multicast packet that arrives by the NIC `ifindex`.
#[inline(always)]
pub(super) fn multicast_in<P: Packet>(
    packet: &P,
    head: &Head,
    node: &Node,
    ifindex: u32,
) -> Decision {
    // Another NIC may be on a link with the same streams.
    if ifindex != node.multicast_ifindex {
        return Decision::PASS;
    }
    let routable = group::is_routable(&address(head.destination));
    if routable || mld_type(packet, head) == MLD_QUERY {
        Decision::new(Action::Copy, node.mat0_ifindex, None)
    } else {
        Decision::PASS
    }
}

/// Type of an MLD message behind Hop-by-Hop Options of 8 bytes, which Router Alert fills (RFC
/// 2711); 0 for other packets.
#[inline(always)]
pub(super) fn mld_type<P: Packet>(packet: &P, head: &Head) -> u8 {
    if head.next_header() != ipv6::HOP_BY_HOP {
        return 0;
    }
    if let Some([ICMPV6, 0, ..]) = packet.payload()
        && let Ok([kind]) = packet.read::<1>(MLD)
    {
        return kind;
    }
    0
}
