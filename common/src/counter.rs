//! The named counters of `COUNTERS`, a per-CPU array of `u64` with index [`Counter`].
//!
//! Every frame or record that creates no state has a counter, so no loss is silent.

/// Defines the enum of a set of counters.
macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Index into `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Counter {
            $($(#[$doc])* $variant,)*
        }

        impl Counter {
            /// All counters in the order of their indices.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];

            /// Name for tables and JSON: lower case with underscores.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

pub(crate) use counters;

counters! {
    /// Valid MLDv1 Reports.
    ReportsV1 => "reports_v1",
    /// Valid MLDv2 Reports.
    ReportsV2 => "reports_v2",
    /// Valid MLDv1 Dones.
    Dones => "dones",
    /// Valid General Queries received on an uplink.
    Queries => "queries",
    /// Valid Queries that a VM sent; dropped.
    GuestQueries => "guest_queries",
    /// Packets of managed multicast addresses received on an uplink.
    NativePackets => "native_packets",
    /// Datagrams from relays, restored to multicast packets.
    RelayedPackets => "relayed_packets",
    /// Copies of multicast packets that this relay sent.
    ReplicatedPackets => "replicated_packets",
    /// Signalling datagrams that `snoop` marked with their TAP.
    SignallingDatagrams => "signalling_datagrams",
    /// Datagram to the agent above the port's rate limit; dropped.
    SignallingRefused => "signalling_refused",
    /// Datagram of a VM from the agents' signalling port, or signalling of a VM behind extension
    /// headers; dropped.
    SignallingForged => "signalling_forged",
    /// Signalling for a VM that this host's agent did not send; dropped.
    SignallingWithheld => "signalling_withheld",

    /// MLD message shorter than its type requires, or longer than the frame.
    MalformedLength => "malformed_length",
    /// MLD message with a hop limit other than 1 (RFC 9777 §5).
    MalformedHopLimit => "malformed_hop_limit",
    /// MLD message whose source is not link-local; `::` is allowed for Reports
    /// (RFC 9777 §5.2.13).
    MalformedSource => "malformed_source",
    /// MLD message without the Router Alert option of value 0 (RFC 2711 §2.1).
    MalformedRouterAlert => "malformed_router_alert",
    /// MLD message with a wrong checksum.
    MalformedChecksum => "malformed_checksum",
    /// Report with a record that exceeds the message.
    MalformedRecord => "malformed_record",
    /// Report, Done or record for an address that is not multicast.
    MalformedAddress => "malformed_address",
    /// Hop-by-Hop Options that exceed their header, or another extension header after them.
    MalformedOptions => "malformed_options",
    /// First fragment of an MLD message. MLD is never fragmented.
    MalformedFragment => "malformed_fragment",
    /// Source in a list that is multicast or unspecified; the rest of the record counts.
    InvalidSource => "invalid_source",
    /// Record of a type that RFC 9777 does not define; skipped (§5.2.12).
    UnknownRecord => "unknown_record",

    /// Record for an address of interface-local, link-local or reserved scope.
    IgnoredScope => "ignored_scope",
    /// EXCLUDE record or MLDv1 message for a source-specific address (RFC 4604 §3).
    IgnoredSsm => "ignored_ssm",
    /// Record that a later Report has overtaken.
    IgnoredStale => "ignored_stale",
    /// Report on a TAP that the agent has not configured.
    IgnoredPort => "ignored_port",

    /// Report above the port's rate limit; dropped.
    RefusedRate => "refused_rate",
    /// Record above the port's limit of listeners.
    RefusedListeners => "refused_listeners",
    /// Source above the port's limit of sources.
    RefusedSources => "refused_sources",
    /// Record refused: `LISTENERS` is full.
    ListenersFull => "listeners_full",
    /// Source refused: `LISTENER_SOURCES` is full.
    SourcesFull => "sources_full",
    /// Packet of a new flow while `STREAMS` is full.
    StreamsFull => "streams_full",
    /// Packet of a new flow above the address's limit of flows in `STREAMS`.
    AddressFlowsFull => "address_flows_full",
    /// Packet of a new flow into a TAP while `DELIVERED` is full; passed on.
    DeliveredFull => "delivered_full",
    /// Packet of a new flow into a TAP above its limit of flows in `DELIVERED`; passed on.
    PortFlowsFull => "port_flows_full",
    /// Query from a new querier while `QUERIER` is full.
    QuerierFull => "querier_full",
    /// Report on a new port while `PORT_USAGE` is full.
    PortUsageFull => "port_usage_full",

    /// Second copy of a packet that arrived natively and from a relay; dropped.
    SecondCopies => "second_copies",
    /// Packet of an origin that the address does not accept; dropped.
    OtherOrigin => "other_origin",
    /// Datagram of a relay to this host, in the port range of relayed flows, without an established
    /// flow; passed on.
    RelayUnknownFlow => "relay_unknown_flow",
    /// Datagram of a relayed flow with inconsistent lengths or without a checksum; dropped.
    RelayMalformed => "relay_malformed",
    /// Fragment of a relay to this host; dropped.
    RelayFragment => "relay_fragment",
    /// Restored packet that would have left this host by a port that is not a VM's; dropped.
    RelayLeaks => "relay_leaks",
    /// Packet with a new fingerprint while `FINGERPRINTS` is full; passed on.
    FingerprintsFull => "fingerprints_full",

    /// Handover frame that waits in `HELD`.
    HeldFrames => "held_frames",
    /// Handover frame without room in `HELD`; dropped.
    HeldLost => "held_lost",
    /// Handover frame too long for `HELD`; dropped.
    HeldOversized => "held_oversized",
    /// Frame for an address that the VM leaves; a copy waits in `HELD` in case the VM does not read
    /// the frame.
    UnreadKept => "unread_kept",
    /// Frame for an address that the VM leaves, without room in `HELD` or too long for it. The VM
    /// receives the frame if it reads the frame.
    UnreadLost => "unread_lost",
    /// Recorded frame that entered its TAP without a probe before it.
    ProbesFailed => "probes_failed",
    /// Frame that passed a holding gate which the agent has not renewed.
    HeldExpired => "held_expired",
    /// Frame into a TAP whose recording the agent has not renewed; neither numbered nor recorded.
    RecordExpired => "record_expired",
    /// Handover frame into a TAP without an entry in `GATE_USAGE`; passed on.
    GateUnready => "gate_unready",

    /// Packet that this relay cannot relay: a fragment.
    ReplicateFragment => "replicate_fragment",
    /// Packet that this relay cannot relay: not UDP, or behind extension headers.
    ReplicateNotUdp => "replicate_not_udp",
    /// Packet that this relay cannot relay: inconsistent lengths or no checksum.
    ReplicateMalformed => "replicate_malformed",
    /// Copy not sent: no route to the agent.
    ReplicateNoRoute => "replicate_no_route",
    /// Copy not sent: route look-ups are disabled, because `net.ipv6.conf.lo.forwarding` is off.
    ReplicateNoForwarding => "replicate_no_forwarding",
    /// Copy not sent: the next hop's link address is unknown.
    ReplicateNoNeighbour => "replicate_no_neighbour",
    /// Copy not sent: larger than the path MTU to the agent.
    ReplicateTooBig => "replicate_too_big",
    /// Copy not sent: the lease of the subscriber has ended.
    ReplicateLeaseEnded => "replicate_lease_ended",
    /// Copy not sent: the interface refused the copy.
    ReplicateRefused => "replicate_refused",

    /// Packet for an address that a VM has left, forwarded to the VM.
    ForwardedPackets => "forwarded_packets",
    /// Packet of an arrived VM from an address that the VM has left, sent from its new address.
    TranslatedPackets => "translated_packets",
    /// Packet not forwarded or translated: hop limit exceeded; dropped.
    ForwardHopLimit => "forward_hop_limit",
    /// Packet not forwarded or translated: no route; dropped.
    ForwardNoRoute => "forward_no_route",
    /// Packet not forwarded or translated: route look-ups are disabled, because
    /// `net.ipv6.conf.lo.forwarding` is off; dropped.
    ForwardNoForwarding => "forward_no_forwarding",
    /// Packet not forwarded: the next hop's link address is unknown; dropped.
    ForwardNoNeighbour => "forward_no_neighbour",
    /// Packet not forwarded or translated: larger than the path MTU; dropped.
    ForwardTooBig => "forward_too_big",
    /// Packet not forwarded or translated: its checksum needs an update but follows extension
    /// headers; dropped.
    ForwardHeaders => "forward_headers",

    /// Report that exceeds the program's limits; the agent processes it.
    Unfinished => "unfinished",
    /// Report that exceeds the agent's limits too; dropped without state.
    Oversized => "oversized",
    /// Event lost because the ring buffer is full.
    EventsLost => "events_lost",
}

/// Number of counters: the size of `COUNTERS`.
pub const COUNT: usize = Counter::ALL.len();

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn indices_are_dense_and_names_unique() {
        let mut names = HashSet::new();
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
            assert!(
                names.insert(counter.as_str()),
                "{counter:?} shares its name"
            );
        }
        assert_eq!(names.len(), COUNT);
    }
}
