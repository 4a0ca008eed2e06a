//! What the probe writes for others to read: the sender's summary and the report of runs.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::metrics::Metrics;
use super::places::Missing;

/// What the sender prints at its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SenderSummary {
    /// Packets per second over all flows.
    pub rate_pps: f64,
    /// UDP payload of each packet in bytes.
    pub payload_bytes: usize,
    /// When the first packet was due, in nanoseconds of the host's monotonic clock.
    pub start_ns: u64,
    /// When the last packet was sent, in the same clock.
    pub last_ns: u64,
    /// Packets the kernel refused to send; they count as sent and will be found lost.
    pub failed: u64,
    /// Per flow.
    pub flows: Vec<FlowSent>,
}

/// What the sender prints when it rests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {
    /// Packets sent by now, over all flows.
    pub sent: u64,
}

/// What was sent of one flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowSent {
    /// Number of the flow.
    pub flow: u16,
    /// Its multicast address.
    pub multicast_address: Ipv6Addr,
    /// Packets sent; sequence numbers run from 0 to one less.
    pub sent: u64,
}

impl Default for FlowSent {
    fn default() -> Self {
        Self {
            flow: 0,
            multicast_address: Ipv6Addr::UNSPECIFIED,
            sent: 0,
        }
    }
}

/// The report of a demo or a measurement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// One row per run.
    pub runs: Vec<RunRow>,
    /// One row per change of the reception mode.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub flaps: Vec<FlapRow>,
}

/// One run: a migration under a stream. Times are in milliseconds of the host's clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunRow {
    /// Kind of the destination's site: `multicast`, `late` or `unicast-only`.
    pub site: String,
    /// Whether plain libvirt did the move, without Roamcast.
    pub baseline: bool,
    /// Stream rate in Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// The guest's memory in MiB.
    pub memory_mib: u32,
    /// Packets sent while the run was measured.
    pub sent: u64,
    /// Of these, packets that reached the application, each counted once.
    pub received: u64,
    /// Packets that never reached it.
    pub lost: u64,
    /// Where they went, as far as somebody counted them.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub lost_at: Vec<Missing>,
    /// Further copies that reached it.
    pub duplicated: u64,
    /// Packets that came after one with a higher number.
    pub reordered: u64,
    /// Outage in the sense of the paper: lost packets by packet rate.
    pub loss_ms: f64,
    /// The longest time in which the application got nothing new.
    pub freeze_ms: f64,
    /// How long the VM was paused.
    pub vm_pause_ms: f64,
    /// How long the guest's clock stood still: the pause without what libvirt needs around it.
    #[serde(default)]
    pub clock_stop_ms: f64,
    /// The longest time in which a thread in the guest that wanted to run did not: the pause, and
    /// what the guest needs to run again. No application can feel less.
    #[serde(default)]
    pub stall_ms: f64,
    /// From the VM's request to the start of the copy.
    pub signalling_ms: f64,
    /// From the start of the copy to its end.
    pub copy_ms: f64,
    /// From the VM's request to the end of the move.
    pub total_ms: f64,
    /// How the destination receives the stream in the end, `native` or `relay`; none for plain
    /// libvirt and a move that failed.
    pub mode: Option<String>,
    /// Whether the VM runs on the destination and the stream flows there.
    pub flows: bool,
    /// Whether the move was to be exact: agents held the stream at a network that carries it, or where a
    /// relay sends it.
    pub is_promised: bool,
    /// Whether the stream flows and, where that was promised, nothing was lost, doubled or reordered
    /// ([`RunRow::judged`]).
    pub ok: bool,
    /// Continuity-counter errors, where the stream is MPEG-TS.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub continuity_errors: Option<u64>,
    /// Of packets that nothing tells apart, those received less those sent: that many at least
    /// were doubled, or lost if it is negative.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub surplus: Option<i64>,
    /// The longest time without an answer in a TCP session that a correspondent has opened to the
    /// guest's permanent address; this and the next ones are there where unicast mobility is.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tcp_in_gap_ms: Option<f64>,
    /// The same of a session that the guest has opened.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tcp_out_gap_ms: Option<f64>,
    /// How many of the two sessions broke.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tcp_resets: Option<u64>,
    /// The longest time without an echo reply from the guest's permanent address.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ping_gap_ms: Option<f64>,
    /// Echo requests that were never answered.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ping_lost: Option<u64>,
    /// Each stream, where there are several. The numbers of packets above are sums then, `loss_ms`
    /// and `freeze_ms` the longest of them.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub streams: Vec<StreamRow>,
}

/// One of several streams that a guest receives during a move.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamRow {
    /// Its multicast address, the first of several.
    pub multicast_address: Ipv6Addr,
    /// Whether the guest listens to the sender only (SSM).
    pub source_specific: bool,
    /// Its rate in Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// As in [`RunRow`].
    pub sent: u64,
    /// As in [`RunRow`].
    pub received: u64,
    /// As in [`RunRow`].
    pub lost: u64,
    /// As in [`RunRow`].
    pub duplicated: u64,
    /// As in [`RunRow`].
    pub reordered: u64,
    /// As in [`RunRow`].
    pub loss_ms: f64,
    /// As in [`RunRow`].
    pub freeze_ms: f64,
    /// As in [`RunRow`].
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub surplus: Option<i64>,
}

/// What a session may stand still beyond the time in which the guest itself does, milliseconds.
const BEYOND_MS: f64 = 100.0;

impl RunRow {
    /// Fills in whether all was as promised, by what else is in the row.
    #[must_use]
    pub fn judged(self) -> Self {
        let none = |count: Option<u64>| count.unwrap_or_default() == 0;
        let is_exact = self.lost + self.duplicated + self.reordered == 0
            && none(self.continuity_errors)
            && none(self.tcp_resets)
            && none(self.ping_lost);
        Self {
            ok: self.flows && (is_exact || !self.is_promised),
            ..self
        }
    }

    /// Whether the sessions by permanent addresses, if there are any, were kept: they went on, and no
    /// ping was lost.
    #[must_use]
    pub fn keeps_sessions(&self) -> bool {
        self.sessions_go_on() && self.ping_lost.unwrap_or_default() == 0
    }

    /// Whether no session broke, and none stood still for long.
    ///
    /// Without KVM the guest does not run at once after the pause: QEMU has translated none of its
    /// code yet. No application can answer while no thread runs, so that is the pause then.
    #[must_use]
    pub fn sessions_go_on(&self) -> bool {
        self.session_gap_ms()
            .is_none_or(|gap_ms| gap_ms <= self.still_ms() + BEYOND_MS)
            && self.tcp_resets.unwrap_or_default() == 0
    }

    /// The longest time in which one of the sessions stood still, if there are any.
    #[must_use]
    pub fn session_gap_ms(&self) -> Option<f64> {
        let gaps = [self.tcp_in_gap_ms, self.tcp_out_gap_ms, self.ping_gap_ms];
        gaps.into_iter().flatten().max_by(f64::total_cmp)
    }

    /// The longest time in which nothing in the guest could answer.
    #[must_use]
    pub fn still_ms(&self) -> f64 {
        self.vm_pause_ms.max(self.stall_ms)
    }

    /// Fills in what the probe measured.
    #[must_use]
    pub fn with_metrics(self, metrics: &Metrics) -> Self {
        Self {
            sent: metrics.sent,
            received: metrics.received,
            lost: metrics.lost,
            duplicated: metrics.duplicated,
            reordered: metrics.reordered,
            loss_ms: metrics.loss_ms,
            freeze_ms: metrics.freeze_ms,
            ..self
        }
    }
}

/// One change of the reception mode under a stream. Times are in milliseconds of the host's clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FlapRow {
    /// The mode it ends in: `relay` or `native`.
    pub to: String,
    /// Stream rate in Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// Packets sent from the network's change to a second after the mode's.
    pub sent: u64,
    /// Packets that never reached the application.
    pub lost: u64,
    /// Further copies that reached it.
    pub duplicated: u64,
    /// Packets that came after one with a higher number.
    pub reordered: u64,
    /// Lost packets by packet rate.
    pub loss_ms: f64,
    /// The longest time in which the application got nothing new.
    pub freeze_ms: f64,
    /// From the network's change to the new mode.
    pub took_ms: f64,
}

impl FlapRow {
    /// Makes a row of what the probe measured.
    #[must_use]
    pub fn new(to: &str, rate_mbps: f64, took_ms: f64, metrics: &Metrics) -> Self {
        Self {
            to: to.to_owned(),
            rate_mbps,
            sent: metrics.sent,
            lost: metrics.lost,
            duplicated: metrics.duplicated,
            reordered: metrics.reordered,
            loss_ms: metrics.loss_ms,
            freeze_ms: metrics.freeze_ms,
            took_ms,
        }
    }

    /// Whether the change doubled nothing and, back to native reception, lost nothing.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.duplicated == 0 && (self.to != "native" || self.lost == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_late_and_lost_is_not_kept() {
        let kept = RunRow {
            vm_pause_ms: 50.0,
            stall_ms: 80.0,
            tcp_in_gap_ms: Some(179.0),
            tcp_out_gap_ms: Some(60.0),
            tcp_resets: Some(0),
            ping_gap_ms: Some(60.0),
            ping_lost: Some(0),
            ..RunRow::default()
        };
        assert!(kept.keeps_sessions());
        assert!(RunRow::default().keeps_sessions());
        for spoil in [
            |row: &mut RunRow| row.tcp_in_gap_ms = Some(181.0),
            |row: &mut RunRow| row.ping_gap_ms = Some(181.0),
            |row: &mut RunRow| row.tcp_resets = Some(1),
            |row: &mut RunRow| row.ping_lost = Some(1),
        ] {
            let mut row = kept.clone();
            spoil(&mut row);
            assert!(!row.keeps_sessions());
        }
    }

    #[test]
    fn move_that_was_to_be_exact_and_was_not_is_not_ok() {
        let row = |is_promised, spoil: fn(&mut RunRow)| {
            let mut row = RunRow {
                flows: true,
                is_promised,
                ..RunRow::default()
            };
            spoil(&mut row);
            row.judged().ok
        };
        assert!(row(true, |_| ()));
        for spoil in [
            |row: &mut RunRow| row.lost = 1,
            |row: &mut RunRow| row.duplicated = 1,
            |row: &mut RunRow| row.reordered = 1,
            |row: &mut RunRow| row.continuity_errors = Some(1),
            |row: &mut RunRow| row.tcp_resets = Some(1),
            |row: &mut RunRow| row.ping_lost = Some(1),
        ] {
            assert!(!row(true, spoil));
            assert!(row(false, spoil));
        }
        assert!(!row(false, |row| row.flows = false));
    }

    #[test]
    fn row_has_the_documented_keys() {
        let value = serde_json::to_value(RunRow::default()).unwrap();
        let keys: Vec<_> = value
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let mut expected = [
            "site",
            "baseline",
            "rate_mbps",
            "memory_mib",
            "sent",
            "received",
            "lost",
            "duplicated",
            "reordered",
            "loss_ms",
            "freeze_ms",
            "vm_pause_ms",
            "clock_stop_ms",
            "stall_ms",
            "signalling_ms",
            "copy_ms",
            "total_ms",
            "mode",
            "flows",
            "is_promised",
            "ok",
        ];
        expected.sort_unstable();
        let mut keys = keys;
        keys.sort_unstable();
        assert_eq!(keys, expected);
    }
}
