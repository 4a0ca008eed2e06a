//! The named reasons behind `COUNTERS`, a per-CPU array of `u64` indexed by [`Counter`].
//!
//! Every frame or record that leaves no state has one, so nothing is lost silently.

/// Makes the enum of a set of counters.
macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// Index into `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Counter {
            $($(#[$doc])* $variant,)*
        }

        impl Counter {
            /// All of them, in the order of their indices.
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
    /// Valid General Queries that came in by an uplink.
    Queries => "queries",
    /// Valid Queries that a VM sent; dropped.
    GuestQueries => "guest_queries",
    /// Packets of watched multicast addresses that came in by an uplink.
    NativePackets => "native_packets",
    /// Datagrams from relays that became multicast packets.
    RelayedPackets => "relayed_packets",
    /// Copies of multicast packets that this relay sent.
    ReplicatedPackets => "replicated_packets",
    /// Signalling datagrams that were marked with their TAP.
    SignallingDatagrams => "signalling_datagrams",
    /// Datagram to the agent dropped: the port sent too many in a second.
    SignallingRefused => "signalling_refused",
    /// Datagram that a VM sent from the agents' port, or signalling of a VM behind extension headers;
    /// dropped.
    SignallingForged => "signalling_forged",
    /// Signalling on its way into a TAP that this host's agent has not sent; dropped.
    SignallingWithheld => "signalling_withheld",

    /// MLD message shorter than its type demands, or longer than the frame.
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
    /// Report with a record that reaches beyond its end.
    MalformedRecord => "malformed_record",
    /// Report, Done or record for something that is not a multicast address.
    MalformedAddress => "malformed_address",
    /// Hop-by-hop options that reach beyond their header, or another extension header after them.
    MalformedOptions => "malformed_options",
    /// First fragment of an MLD message. MLD is never fragmented.
    MalformedFragment => "malformed_fragment",
    /// Listed source that is multicast or unspecified; the rest of the record counts.
    InvalidSource => "invalid_source",
    /// Record of a type that RFC 9777 does not know; skipped (§5.2.12).
    UnknownRecord => "unknown_record",

    /// Record for an address of interface-local, link-local or reserved scope.
    IgnoredScope => "ignored_scope",
    /// EXCLUDE record or MLDv1 message for a source-specific address (RFC 4604 §3).
    IgnoredSsm => "ignored_ssm",
    /// Record that was already overtaken by a later Report.
    IgnoredStale => "ignored_stale",
    /// Report on a TAP that the agent has not configured.
    IgnoredPort => "ignored_port",

    /// Report dropped: the port sent too many in a second.
    RefusedRate => "refused_rate",
    /// Record refused: the port has too many listeners.
    RefusedListeners => "refused_listeners",
    /// Source refused: the port has too many.
    RefusedSources => "refused_sources",
    /// Record refused: `LISTENERS` is full.
    ListenersFull => "listeners_full",
    /// Source refused: `LISTENER_SOURCES` is full.
    SourcesFull => "sources_full",
    /// Packet of a flow that found `STREAMS` full.
    StreamsFull => "streams_full",
    /// Packet of a flow whose address has as many in `STREAMS` as it may have.
    AddressFlowsFull => "address_flows_full",
    /// Packet into a TAP of a flow that found `DELIVERED` full; passed on.
    DeliveredFull => "delivered_full",
    /// Packet into a TAP that has as many flows in `DELIVERED` as it may have; passed on.
    PortFlowsFull => "port_flows_full",
    /// Query that found `QUERIER` full.
    QuerierFull => "querier_full",
    /// Report on a port that found `PORT_USAGE` full.
    PortUsageFull => "port_usage_full",

    /// Second copy of a packet that came natively and from a relay, dropped.
    SecondCopies => "second_copies",
    /// Packet of an origin that the address is not received by now, dropped.
    OtherOrigin => "other_origin",
    /// Datagram of a relay to this host and the port range of relayed flows that is no established
    /// flow; passed on.
    RelayUnknownFlow => "relay_unknown_flow",
    /// Datagram of a relayed flow whose lengths do not agree, or that has no checksum; dropped.
    RelayMalformed => "relay_malformed",
    /// Fragment of a relay to this host; dropped.
    RelayFragment => "relay_fragment",
    /// Restored packet that would have left this host by another port; dropped.
    RelayLeaks => "relay_leaks",
    /// Packet with a fingerprint that found `FINGERPRINTS` full; passed.
    FingerprintsFull => "fingerprints_full",

    /// Frame of a handover that waits in `HELD`.
    HeldFrames => "held_frames",
    /// Frame of a handover that found no room in `HELD`; dropped.
    HeldLost => "held_lost",
    /// Frame of a handover that is too long to be held; dropped.
    HeldOversized => "held_oversized",
    /// Frame for an address that its VM leaves, which waits in `HELD` for the case that the VM does
    /// not read it.
    UnreadKept => "unread_kept",
    /// The same that found no room in `HELD`, or is too long for it; the VM gets it if it reads it.
    UnreadLost => "unread_lost",
    /// Recorded frame that went into its TAP without a probe before it.
    ProbesFailed => "probes_failed",
    /// Frame that passed a gate which its agent has not renewed.
    HeldExpired => "held_expired",
    /// Frame into a TAP whose recording its agent has not renewed; neither numbered nor recorded.
    RecordExpired => "record_expired",
    /// Frame of a handover into a TAP that has no entry in `GATE_USAGE` (any more); passed on.
    GateUnready => "gate_unready",

    /// Packet that this relay cannot relay: a fragment.
    ReplicateFragment => "replicate_fragment",
    /// Packet that this relay cannot relay: not UDP, or behind extension headers.
    ReplicateNotUdp => "replicate_not_udp",
    /// Packet that this relay cannot relay: its lengths do not agree, or it has no checksum.
    ReplicateMalformed => "replicate_malformed",
    /// Copy not sent: no route to the agent.
    ReplicateNoRoute => "replicate_no_route",
    /// Copy not sent: routes cannot be looked up, because `net.ipv6.conf.lo.forwarding` was
    /// switched off.
    ReplicateNoForwarding => "replicate_no_forwarding",
    /// Copy not sent: the next hop's link address is not known (yet).
    ReplicateNoNeighbour => "replicate_no_neighbour",
    /// Copy not sent: larger than the path to the agent takes.
    ReplicateTooBig => "replicate_too_big",
    /// Copy not sent: its lease has ended.
    ReplicateLeaseEnded => "replicate_lease_ended",
    /// Copy not sent: the interface did not take it.
    ReplicateRefused => "replicate_refused",

    /// Packet for an address that its VM has left, sent on to where the VM is.
    ForwardedPackets => "forwarded_packets",
    /// Packet that an arrived VM has sent from an address that it has left, sent from its new one.
    TranslatedPackets => "translated_packets",
    /// Packet not forwarded or translated: its hop limit is used up; dropped.
    ForwardHopLimit => "forward_hop_limit",
    /// Packet not forwarded or translated: no route; dropped.
    ForwardNoRoute => "forward_no_route",
    /// Packet not forwarded or translated: routes cannot be looked up, because
    /// `net.ipv6.conf.lo.forwarding` was switched off; dropped.
    ForwardNoForwarding => "forward_no_forwarding",
    /// Packet not forwarded: the next hop's link address is not known (yet); dropped.
    ForwardNoNeighbour => "forward_no_neighbour",
    /// Packet not forwarded or translated: larger than the path takes; dropped.
    ForwardTooBig => "forward_too_big",
    /// Packet not forwarded or translated: its checksum would have to change, and stands behind
    /// extension headers; dropped.
    ForwardHeaders => "forward_headers",

    /// Report handed to the agent because the program could not finish it.
    Unfinished => "unfinished",
    /// Report too long for the agent too: no state.
    Oversized => "oversized",
    /// Event that found the ring buffer full.
    EventsLost => "events_lost",
}

/// Number of counters, the size of `COUNTERS`.
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
