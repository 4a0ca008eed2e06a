//! The named reasons behind `MAT_COUNTERS`, a per-CPU array of `u64` indexed by [`Counter`].
//!
//! Every frame that is translated has one, and every one that goes no further.

use crate::counter::counters;

counters! {
    /// Packet to a peer, sent by the active NIC.
    OutTranslated => "out_translated",
    /// MLD message of `mat0`, sent by the multicast NIC.
    OutMld => "out_mld",
    /// ICMPv6 error of the daemon about a held packet, handed to `mat0`.
    OutRefused => "out_refused",
    /// Packet to a peer that is not known yet, handed to the daemon.
    Held => "held",

    /// Such a packet, but too long to be held: lost. The daemon learns of the peer all the same.
    HeldTooLong => "held_too_long",
    /// Such a packet that found the ring buffer full: lost.
    HeldFull => "held_full",
    /// Not sent: no NIC is active.
    OutNoNic => "out_no_nic",
    /// Not sent: its source is not the HoA.
    OutForeignSource => "out_foreign_source",
    /// Not sent: nothing that `mat0` carries, such as multicast other than MLD.
    OutNotCarried => "out_not_carried",
    /// Not sent: MLD while the multicast NIC has no link-local address, or there is none.
    OutMldNoSource => "out_mld_no_source",
    /// Not sent: the checksum has to be changed, and stands behind headers that are not passed.
    OutUntranslatable => "out_untranslatable",
    /// Not sent: the kernel did not let the packet be written to.
    OutRefusedByKernel => "out_refused_by_kernel",

    /// Packet of a peer, handed to `mat0`.
    InTranslated => "in_translated",
    /// ICMPv6 error about a packet to a peer, handed to `mat0`.
    InErrors => "in_errors",
    /// Message of another node's daemon or of the IMS, left as it was.
    InSignalling => "in_signalling",
    /// Multicast packet or MLD Query of the multicast NIC, of which `mat0` got a copy.
    InMulticast => "in_multicast",

    /// Dropped: a wire carries no address of the home prefix.
    InHomeOnWire => "in_home_on_wire",
    /// Dropped: as `out_untranslatable`.
    InUntranslatable => "in_untranslatable",
    /// No copy for `mat0`: the kernel did not make it.
    InMulticastLost => "in_multicast_lost",
    /// Dropped: the kernel did not let the packet be written to.
    InRefusedByKernel => "in_refused_by_kernel",
}

/// Number of counters, the size of `MAT_COUNTERS`.
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
