//! Packet counters of the kernel, from `/proc/net`, which show where a lost packet was dropped.

use std::collections::BTreeMap;
use std::path::Path;

/// Counters by name, such as `eth0.rx_dropped` and `Udp6RcvbufErrors`.
pub type Counters = BTreeMap<String, u64>;

/// Names of `/proc/net/dev`'s columns, in the kernel's words (`struct rtnl_link_stats64`).
const COLUMNS: [&str; 16] = [
    "rx_bytes",
    "rx_packets",
    "rx_errors",
    "rx_dropped",
    "rx_fifo_errors",
    "rx_frame_errors",
    "rx_compressed",
    "multicast",
    "tx_bytes",
    "tx_packets",
    "tx_errors",
    "tx_dropped",
    "tx_fifo_errors",
    "collisions",
    "tx_carrier_errors",
    "tx_compressed",
];
/// Prefixes of the lines of `/proc/net/snmp6` about received packets.
const RECEIVED: [&str; 2] = ["Ip6In", "Udp6"];

/// Returns the counters of the calling thread's network namespace: interfaces as `eth0.rx_packets`,
/// and received packets of IPv6 and UDP as `Udp6RcvbufErrors`.
pub fn here() -> Counters {
    let read = |name| std::fs::read_to_string(Path::new("/proc/thread-self/net").join(name));
    let mut counters = links(&read("dev").unwrap_or_default());
    counters.extend(received(&read("snmp6").unwrap_or_default()));
    counters
}

/// Returns the growth of the counters that grew. The counters of a new interface begin at 0.
pub fn grown(before: &Counters, after: &Counters) -> Counters {
    after
        .iter()
        .map(|(name, value)| {
            let before = before.get(name).copied().unwrap_or_default();
            (name.clone(), value.saturating_sub(before))
        })
        .filter(|(_, value)| *value > 0)
        .collect()
}

fn links(text: &str) -> Counters {
    let mut counters = Counters::new();
    for line in text.lines().skip(2) {
        let Some((name, numbers)) = line.split_once(':') else {
            continue;
        };
        for (column, number) in COLUMNS.iter().zip(numbers.split_whitespace()) {
            if let Ok(number) = number.parse() {
                counters.insert(format!("{}.{column}", name.trim()), number);
            }
        }
    }
    counters
}

fn received(text: &str) -> Counters {
    let of_line = |line: &str| {
        let (name, number) = line.split_once(char::is_whitespace)?;
        let is_wanted = RECEIVED.iter().any(|prefix| name.starts_with(prefix));
        Some((name.to_owned(), number.trim().parse().ok()?)).filter(|_| is_wanted)
    };
    text.lines().filter_map(of_line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEV: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
  eth0: 1500       10    0    2    0     0          0         7      900       9    0    1    0     0       0          0
";

    #[test]
    fn each_interfaces_numbers_have_the_kernels_names() {
        let counters = links(DEV);
        assert_eq!(counters["eth0.rx_packets"], 10);
        assert_eq!(counters["eth0.rx_dropped"], 2);
        assert_eq!(counters["eth0.tx_packets"], 9);
        assert_eq!(counters["eth0.tx_dropped"], 1);
    }

    #[test]
    fn only_what_was_received_is_taken_of_the_protocols() {
        let counters = received("Ip6InReceives   12\nIp6OutRequests  3\nUdp6RcvbufErrors  4\n");
        assert_eq!(counters.len(), 2);
        assert_eq!(counters["Udp6RcvbufErrors"], 4);
    }

    #[test]
    fn only_what_has_grown_is_told_and_new_interfaces_begin_at_nothing() {
        let counters = |values: &[(&str, u64)]| -> Counters {
            let named = values
                .iter()
                .map(|(name, value)| ((*name).to_owned(), *value));
            named.collect()
        };
        let before = counters(&[("a", 1), ("b", 2), ("gone", 5)]);
        let after = counters(&[("a", 4), ("b", 2), ("new", 3)]);
        assert_eq!(grown(&before, &after), counters(&[("a", 3), ("new", 3)]));
    }
}
