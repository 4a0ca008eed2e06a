//! The named reasons behind every count.

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What was asked and refused.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl Counters {
            /// Each with its name.
            pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Datagrams that came in.
    datagrams,
    /// Lookups that found a mapping.
    lookups_found,
    /// Lookups that found none.
    lookups_not_found,
    /// Updates that were stored.
    updates_stored,
    /// Updates that were acknowledged before.
    updates_repeated,
    /// Updates that waited for one before them.
    updates_waited,
    /// Updates with a sequence that is not newer.
    updates_old_sequence,
    /// Updates whose time is too far from the server's.
    updates_wrong_time,
    /// Updates with addresses that cannot be MoAs.
    updates_bad_addresses,
    /// Updates with an address that another node has, or had until a while ago.
    updates_taken_addresses,
    /// Updates that could not be stored.
    updates_failed,
    /// Mappings whose lifetime ended.
    mappings_ended,
    /// Keys of a newer generation that came without being enrolled here.
    generations_learnt,
    /// Datagrams sealed with a key that was replaced.
    old_keys,
    /// Datagrams sealed with no key of their HoA, or changed on their way.
    forged,
    /// Datagrams in the name of an address outside the home prefix.
    foreign,
    /// Datagrams that are no message.
    malformed,
    /// Messages that no node has to send to a server.
    unexpected,
    /// Requests that came before; they are answered while all senders together do not exceed an allowance.
    repeated,
    /// Requests over the allowance of their source.
    rate_limited,
    /// Requests of a source for which there was no room.
    sources_full,
    /// Answers that were not sent, because the kernel gave no random numbers for them.
    no_random_numbers,
    /// Times that the wall clock was set.
    clock_jumps,
}
