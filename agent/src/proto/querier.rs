//! MLD queriers heard by the uplinks, and the timers that follow from their Queries (RFC 9777 §7.6.2,
//! §9).
//!
//! Any node on a link can send a General Query. So a Query changes the timers only where the change is
//! harmless:
//! - The values are clamped to plausible ranges.
//! - A querier's values count until its Other Querier Present Interval (§9.5) has passed, and the
//!   longest interval of all live queriers applies. A forged Query, even from the querier's own
//!   address, cannot shorten the querier's interval.
//! - No interval is shorter than the default interval. A listener that vanished silently stays a little
//!   longer if the querier asks more often; a present listener is never lost.
//! - A link keeps a few queriers, those with the longest intervals.

use std::collections::BTreeMap;
use std::time::Duration;

use common::maps::{Address, Network, Querier, QuerierKey};
use common::wire::mld::{QUERY_INTERVAL_SECONDS, ROBUSTNESS_VARIABLE};

use super::Timestamp;

/// Query Interval without a querier.
const QUERY_INTERVAL: Duration = Duration::from_secs(QUERY_INTERVAL_SECONDS as u64);
/// Query Response Interval without a querier (RFC 9777 §9.3).
const QUERY_RESPONSE_INTERVAL: Duration = Duration::from_secs(10);
/// Multicast Address Listening Interval of these defaults.
const LISTENING_INTERVAL: Duration =
    listening_interval(ROBUSTNESS_VARIABLE, QUERY_INTERVAL, QUERY_RESPONSE_INTERVAL);
/// Longest accepted Query Interval; QQIC can encode 31,744 s.
const LONGEST_QUERY_INTERVAL: Duration = Duration::from_secs(3600);
/// Longest accepted Query Response Interval; the Maximum Response Code can encode 8,388 s.
const LONGEST_RESPONSE_INTERVAL: Duration = Duration::from_secs(60);
/// Limit of queriers per link. Several queriers coexist only until all but one have heard the others.
const QUERIERS_PER_LINK: usize = 4;
/// Limit of links, equal to the size of `QUERIER`.
const LINKS: usize = 1024;

/// Queriers of all links.
#[derive(Debug, Default)]
pub(super) struct Queriers {
    links: BTreeMap<QuerierKey, BTreeMap<Said, Querier>>,
}

/// A querier's identity: address, Robustness Variable and both intervals. New values from the same
/// address do not replace the former values.
type Said = (Address, u8, u32, u32);

impl Queriers {
    /// Records a General Query.
    pub(super) fn heard(&mut self, key: QuerierKey, value: Querier) {
        let now = Timestamp(value.last_query_ns);
        if !self.links.contains_key(&key) && self.links.len() >= LINKS {
            self.links
                .retain(|_, heard| heard.values().any(|querier| is_live(querier, now)));
            if self.links.len() >= LINKS {
                return;
            }
        }
        let heard = self.links.entry(key).or_default();
        let said = (
            value.address,
            value.robustness,
            value.query_interval_ms,
            value.query_response_interval_ms,
        );
        heard.insert(said, value);
        if heard.len() > QUERIERS_PER_LINK {
            heard.retain(|_, querier| is_live(querier, now));
        }
        if heard.len() > QUERIERS_PER_LINK
            && let Some(shortest) = heard
                .iter()
                .min_by_key(|(_, querier)| listening_interval_of(querier))
                .map(|(said, _)| *said)
        {
            heard.remove(&shortest);
        }
    }

    /// Returns the querier of each link: the lowest address among the queriers that were live when the
    /// last Query arrived (RFC 9777 §7.1).
    pub(super) fn elected(&self) -> impl Iterator<Item = (&QuerierKey, &Querier)> {
        self.links.iter().filter_map(|(key, heard)| {
            let last = heard.values().map(|querier| querier.last_query_ns).max()?;
            let querier = heard
                .values()
                .find(|querier| is_live(querier, Timestamp(last)))?;
            Some((key, querier))
        })
    }

    /// Returns the Multicast Address Listening Interval of a network at a time (RFC 9777 §9.4): the
    /// longest of the live queriers' intervals and the default.
    pub(super) fn listening_interval(&self, network: Network, now: Timestamp) -> Duration {
        self.live(network, now)
            .map(listening_interval_of)
            .fold(LISTENING_INTERVAL, Duration::max)
    }

    /// Returns the maximum response time to a Query in a network: the longest Query Response Interval of
    /// the live queriers, or the default without a live querier.
    pub(super) fn response_interval(&self, network: Network, now: Timestamp) -> Duration {
        self.live(network, now)
            .map(response_interval)
            .max()
            .unwrap_or(QUERY_RESPONSE_INTERVAL)
    }

    fn live(&self, network: Network, now: Timestamp) -> impl Iterator<Item = &Querier> {
        self.links
            .iter()
            .filter(move |(key, _)| key.network() == network)
            .flat_map(|(_, heard)| heard.values())
            .filter(move |querier| is_live(querier, now))
    }
}

fn listening_interval_of(querier: &Querier) -> Duration {
    listening_interval(
        robustness(querier),
        query_interval(querier),
        response_interval(querier),
    )
}

/// Returns true until a querier's Other Querier Present Interval has passed (RFC 9777 §9.5).
fn is_live(querier: &Querier, now: Timestamp) -> bool {
    let present =
        query_interval(querier) * u32::from(robustness(querier)) + response_interval(querier) / 2;
    now.since(Timestamp(querier.last_query_ns)) <= present
}

/// Returns the Robustness Variable, at least the default: the value must not be 0 and should not be 1
/// (RFC 9777 §9.1).
fn robustness(querier: &Querier) -> u8 {
    querier.robustness.max(ROBUSTNESS_VARIABLE)
}

fn query_interval(querier: &Querier) -> Duration {
    millis(querier.query_interval_ms).clamp(Duration::from_secs(1), LONGEST_QUERY_INTERVAL)
}

/// Returns the Query Response Interval, at most the Query Interval (RFC 9777 §9.3).
fn response_interval(querier: &Querier) -> Duration {
    millis(querier.query_response_interval_ms)
        .min(query_interval(querier))
        .min(LONGEST_RESPONSE_INTERVAL)
}

fn millis(ms: u32) -> Duration {
    Duration::from_millis(ms.into())
}

/// Returns the Multicast Address Listening Interval (RFC 9777 §9.4): Robustness Variable times Query
/// Interval plus two Query Response Intervals.
const fn listening_interval(robustness: u8, query: Duration, response: Duration) -> Duration {
    let query = query.saturating_mul(robustness as u32);
    query.saturating_add(response.saturating_mul(2))
}

#[cfg(test)]
mod tests {
    use common::maps::BridgeNumber;

    use super::*;

    const S: u64 = 1_000_000_000;
    const KEY: QuerierKey = QuerierKey {
        ifindex: 2,
        vlan: 0,
        bridge: BridgeNumber::FIRST,
    };

    fn querier(last: u8, at_s: u64, interval_s: u32, response_ms: u32, robustness: u8) -> Querier {
        let mut address = [0; 16];
        (address[0], address[1], address[15]) = (0xfe, 0x80, last);
        Querier {
            last_query_ns: at_s * S,
            address,
            query_interval_ms: interval_s * 1000,
            query_response_interval_ms: response_ms,
            robustness,
            mld_version: 2,
            pad: [0; 3],
        }
    }

    fn at(seconds: u64) -> Timestamp {
        Timestamp(seconds * S)
    }

    /// Returns a network on the bridge of [`KEY`].
    fn vlan(vlan: u16) -> Network {
        Network {
            bridge: KEY.bridge,
            vlan,
        }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn without_a_querier_the_intervals_are_the_defaults() {
        let queriers = Queriers::default();
        assert_eq!(queriers.listening_interval(vlan(0), at(0)), seconds(270));
        assert_eq!(queriers.response_interval(vlan(0), at(0)), seconds(10));
    }

    #[test]
    fn longer_interval_of_a_querier_holds_on_its_vlan_while_the_querier_lives() {
        let mut queriers = Queriers::default();
        queriers.heard(KEY, querier(1, 10, 600, 5000, 3));
        assert_eq!(queriers.listening_interval(vlan(0), at(10)), seconds(1810));
        assert_eq!(queriers.listening_interval(vlan(7), at(10)), seconds(270));
        let elsewhere = Network {
            bridge: BridgeNumber(2),
            vlan: 0,
        };
        assert_eq!(queriers.listening_interval(elsewhere, at(10)), seconds(270));
        // 3 * 600 s + 2.5 s after the Query.
        assert_eq!(
            queriers.listening_interval(vlan(0), at(1812)),
            seconds(1810)
        );
        assert_eq!(queriers.listening_interval(vlan(0), at(1813)), seconds(270));
    }

    #[test]
    fn forged_query_shortens_nothing_whatever_its_address() {
        for forger in [0, 1, 2] {
            let mut queriers = Queriers::default();
            queriers.heard(KEY, querier(1, 10, 600, 10_000, 2));
            queriers.heard(KEY, querier(forger, 11, 1, 0, 1));
            assert_eq!(
                queriers.listening_interval(vlan(0), at(11)),
                seconds(1220),
                "{forger}"
            );
        }
    }

    #[test]
    fn query_with_short_intervals_does_not_shorten_the_defaults() {
        // The shortest Query that a host can forge: QRV 1, QQIC 1, MRC 0.
        let mut queriers = Queriers::default();
        queriers.heard(KEY, querier(0, 10, 1, 0, 1));
        assert_eq!(queriers.listening_interval(vlan(0), at(11)), seconds(270));
    }

    #[test]
    fn values_no_network_means_are_clamped() {
        let mut queriers = Queriers::default();
        queriers.heard(KEY, querier(1, 10, 31_744, 8_387_584, 7));
        assert_eq!(
            queriers.listening_interval(vlan(0), at(10)),
            seconds(7 * 3600 + 120)
        );
        assert_eq!(queriers.response_interval(vlan(0), at(10)), seconds(60));
        assert_eq!(
            queriers.listening_interval(vlan(0), at(10 + 7 * 3600 + 31)),
            seconds(270)
        );
    }

    #[test]
    fn lowest_address_that_lives_is_elected() {
        let mut queriers = Queriers::default();
        let elected = |queriers: &Queriers| queriers.elected().next().unwrap().1.address[15];
        queriers.heard(KEY, querier(5, 10, 125, 10_000, 2));
        queriers.heard(KEY, querier(9, 11, 125, 10_000, 2));
        assert_eq!(elected(&queriers), 5);
        queriers.heard(KEY, querier(9, 260, 125, 10_000, 2));
        assert_eq!(elected(&queriers), 5);
        queriers.heard(KEY, querier(9, 266, 125, 10_000, 2));
        assert_eq!(elected(&queriers), 9);
    }

    #[test]
    fn forged_addresses_and_vlans_displace_no_live_querier_and_take_bounded_room() {
        let mut queriers = Queriers::default();
        queriers.heard(KEY, querier(200, 10, 600, 10_000, 2));
        for address in 0..100 {
            queriers.heard(KEY, querier(address, 11, 125, 10_000, 2));
        }
        assert_eq!(queriers.listening_interval(vlan(0), at(11)), seconds(1220));
        assert_eq!(queriers.links[&KEY].len(), QUERIERS_PER_LINK);
        for vlan in 1..4095 {
            queriers.heard(QuerierKey { vlan, ..KEY }, querier(1, 12, 125, 10_000, 2));
        }
        assert_eq!(queriers.links.len(), LINKS);
        // Expired queriers make room.
        queriers.heard(
            QuerierKey { vlan: 4000, ..KEY },
            querier(1, 5000, 125, 10_000, 2),
        );
        assert!(queriers.links.len() < 3);
    }
}
