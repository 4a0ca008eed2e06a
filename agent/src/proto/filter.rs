//! Source filters of listeners, and the union of filters for the host's membership (RFC 9777 §4.2, RFC
//! 4605 §4.1).

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use common::maps::{Address, FilterMode, ManagedKey};

use super::Membership;

/// Filter mode and source list of one listener.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    /// INCLUDE lists the only wanted sources, EXCLUDE the only unwanted sources.
    pub(super) mode: FilterMode,
    /// Sources that the mode refers to.
    pub(super) sources: BTreeSet<Ipv6Addr>,
}

impl Filter {
    /// Returns the filter that accepts no source: INCLUDE with an empty list.
    pub(super) fn nothing() -> Self {
        Self {
            mode: FilterMode::Include,
            sources: BTreeSet::new(),
        }
    }

    /// Returns the union of several filters. If any filter has mode EXCLUDE, the union excludes the
    /// sources that all EXCLUDE filters list and that no INCLUDE filter lists.
    pub(super) fn merge<'a>(filters: impl Iterator<Item = &'a Self> + Clone) -> Self {
        let included: BTreeSet<_> = filters
            .clone()
            .filter(|filter| filter.mode == FilterMode::Include)
            .flat_map(|filter| filter.sources.iter().copied())
            .collect();
        let mut excluding = filters.filter(|filter| filter.mode == FilterMode::Exclude);
        let Some(first) = excluding.next() else {
            return Self {
                mode: FilterMode::Include,
                sources: included,
            };
        };
        let mut sources = first.sources.clone();
        for filter in excluding {
            sources.retain(|source| filter.sources.contains(source));
        }
        sources.retain(|source| !included.contains(source));
        Self {
            mode: FilterMode::Exclude,
            sources,
        }
    }

    /// Returns true if the filter accepts a source.
    pub(super) fn accepts(&self, source: &Address) -> bool {
        let listed = self.sources.contains(&Ipv6Addr::from(*source));
        match self.mode {
            FilterMode::Include => listed,
            FilterMode::Exclude => !listed,
        }
    }

    /// Returns the membership of an address with this filter.
    pub(super) fn membership(&self, key: ManagedKey) -> Membership {
        Membership {
            key,
            filter_mode: self.mode,
            sources: self.sources.iter().copied().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use FilterMode::{Exclude, Include};
    use proptest::prelude::*;

    fn filter(mode: FilterMode, sources: &[u16]) -> Filter {
        Filter {
            mode,
            sources: sources.iter().map(|s| address(*s)).collect(),
        }
    }

    fn address(last: u16) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last)
    }

    #[test]
    fn include_lists_are_united() {
        let merged = Filter::merge([filter(Include, &[1, 2]), filter(Include, &[2, 3])].iter());
        assert_eq!(merged, filter(Include, &[1, 2, 3]));
    }

    #[test]
    fn exclude_lists_are_cut_to_what_nobody_wants() {
        let filters = [
            filter(Exclude, &[1, 2, 3]),
            filter(Exclude, &[2, 3, 4]),
            filter(Include, &[3]),
        ];
        assert_eq!(Filter::merge(filters.iter()), filter(Exclude, &[2]));
    }

    proptest! {
        #[test]
        fn merged_filter_accepts_exactly_what_some_listener_accepts(
            filters in prop::collection::vec((any::<bool>(), prop::collection::vec(0_u16..6, 0..5)), 1..5),
            source in 0_u16..6,
        ) {
            let filters: Vec<_> = filters
                .iter()
                .map(|(include, s)| filter(if *include { Include } else { Exclude }, s))
                .collect();
            let source = address(source).octets();
            let wanted = filters.iter().any(|f| f.accepts(&source));
            prop_assert_eq!(Filter::merge(filters.iter()).accepts(&source), wanted);
        }
    }
}
