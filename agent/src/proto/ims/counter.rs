//! Counters by reason.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counts of requests and refusals, by reason.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Returns each counter with its name.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Received datagrams.
    datagrams,
    /// Lookups that found a mapping.
    lookups_found,
    /// Lookups without a mapping.
    lookups_not_found,
    /// Updates that were stored.
    updates_stored,
    /// Repeated updates that were acknowledged before.
    updates_repeated,
    /// Updates that waited for a pending write.
    updates_waited,
    /// Updates without a newer sequence.
    updates_old_sequence,
    /// Updates whose time is too far from the server's.
    updates_wrong_time,
    /// Updates with addresses that cannot be MoAs.
    updates_bad_addresses,
    /// Updates with an address that another node has, or had recently.
    updates_taken_addresses,
    /// Updates that could not be stored.
    updates_failed,
    /// Writes that lost to another server's in the same store.
    writes_lost,
    /// Newer states of nodes that another server stored.
    changes_by_others,
    /// Mappings whose lifetime ended.
    mappings_ended,
    /// Newer generations learnt from a datagram instead of an enrollment at this server.
    generations_learnt,
    /// Datagrams sealed with a key that was replaced.
    old_keys,
    /// Datagrams that no key of their HoA opens: forged, or altered in transit.
    forged,
    /// Datagrams with a HoA outside the home prefix.
    foreign,
    /// Datagrams that cannot be decoded.
    malformed,
    /// Messages that no node sends to a server.
    unexpected,
    /// Repeated requests; the server answers them within one allowance for all senders together.
    repeated,
    /// Requests beyond the allowance of their source.
    rate_limited,
    /// Requests of sources beyond the limit of distinguished sources.
    sources_full,
    /// Answers not sent, because the kernel returned no random numbers.
    no_random_numbers,
    /// Changes of the wall clock.
    clock_jumps,
}
