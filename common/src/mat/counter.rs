//! The named counters of `MAT_COUNTERS`, a per-CPU array of `u64` with index [`Counter`].
//!
//! Every translated frame has a counter, and every dropped one.

use crate::counter::counters;

counters! {
    /// Packet to a peer, sent by the active NIC.
    OutTranslated => "out_translated",
    /// MLD message of `mat0`, sent by the multicast NIC.
    OutMld => "out_mld",
    /// ICMPv6 error of the daemon about a held packet, handed to `mat0`.
    OutRefused => "out_refused",
    /// Packet to an unknown peer, handed to the daemon.
    Held => "held",

    /// Packet to an unknown peer, too long for `HELD`: lost. The daemon still learns the peer.
    HeldTooLong => "held_too_long",
    /// Packet to an unknown peer while `HELD` is full: lost.
    HeldFull => "held_full",
    /// Not sent: no NIC is active.
    OutNoNic => "out_no_nic",
    /// Not sent: its source is not the HoA.
    OutForeignSource => "out_foreign_source",
    /// Not sent: a packet that `mat0` does not carry, such as multicast other than MLD.
    OutNotCarried => "out_not_carried",
    /// Not sent: MLD without a multicast NIC, or without a link-local address on it.
    OutMldNoSource => "out_mld_no_source",
    /// Not sent: the checksum needs an update, and follows headers that the search does not skip.
    OutUntranslatable => "out_untranslatable",
    /// Not sent: the kernel refused the write to the packet.
    OutRefusedByKernel => "out_refused_by_kernel",

    /// Packet of a peer, handed to `mat0`.
    InTranslated => "in_translated",
    /// ICMPv6 error about a packet to a peer, handed to `mat0`.
    InErrors => "in_errors",
    /// Message of another node's daemon or of the IMS, passed unchanged.
    InSignalling => "in_signalling",
    /// Multicast packet or MLD Query of the multicast NIC, copied to `mat0`.
    InMulticast => "in_multicast",

    /// Dropped: an address of the home prefix on the wire.
    InHomeOnWire => "in_home_on_wire",
    /// Dropped: the checksum needs an update, and follows headers that the search does not skip.
    InUntranslatable => "in_untranslatable",
    /// Not copied to `mat0`: the kernel could not clone the packet.
    InMulticastLost => "in_multicast_lost",
    /// Dropped: the kernel refused the write to the packet.
    InRefusedByKernel => "in_refused_by_kernel",
}

/// Number of counters: the size of `MAT_COUNTERS`.
pub const COUNT: usize = Counter::ALL.len();

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn indices_are_dense_and_names_unique() {
        let names: HashSet<_> = Counter::ALL.iter().map(|it| it.as_str()).collect();
        assert_eq!(names.len(), COUNT);
        assert!(
            (0..)
                .zip(Counter::ALL)
                .all(|(index, it)| *it as usize == index)
        );
    }
}
