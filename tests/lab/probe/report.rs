//! Reports of the probe: the sender's summary and the rows of runs.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use super::metrics::Metrics;
use super::places::Missing;

/// Summary that the sender prints at its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SenderSummary {
    /// Packets per second over all flows.
    pub rate_pps: f64,
    /// UDP payload of each packet in bytes.
    pub payload_bytes: usize,
    /// Time at which the first packet was due, in nanoseconds of the host's monotonic clock.
    pub start_ns: u64,
    /// Time at which the last packet was sent, in the same clock.
    pub last_ns: u64,
    /// Packets that the kernel refused to send. They count as sent and as lost.
    pub failed: u64,
    /// Packets sent of each flow.
    pub flows: Vec<FlowSent>,
}

/// Output of the sender when it pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rest {
    /// Packets sent by now, over all flows.
    pub sent: u64,
}

/// Packets sent of one flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowSent {
    /// Number of the flow, as in the stamps.
    pub flow: u16,
    /// Multicast address of the flow.
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
    /// True if plain libvirt did the migration, without Roamcast.
    pub baseline: bool,
    /// Stream rate in Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// The guest's memory in MiB.
    pub memory_mib: u32,
    /// Packets sent during the measurement.
    pub sent: u64,
    /// Packets that reached the application, each counted once.
    pub received: u64,
    /// Packets that never reached the application.
    pub lost: u64,
    /// Places at which packets were lost, as far as a counter shows it.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub lost_at: Vec<Missing>,
    /// Arrivals at the application beyond the first of each packet.
    pub duplicated: u64,
    /// Packets that arrived after a packet of the same flow with a higher number.
    pub reordered: u64,
    /// Outage as the paper defines it: lost packets divided by the packet rate.
    pub loss_ms: f64,
    /// Longest time in which the application received nothing new.
    pub freeze_ms: f64,
    /// Duration of the VM's pause, by libvirt's statistics.
    pub vm_pause_ms: f64,
    /// Time during which the guest's clock stood still: the pause without libvirt's overhead.
    #[serde(default)]
    pub clock_stop_ms: f64,
    /// Longest time in which a thread in the guest that was ready to run did not run: the pause,
    /// and the time that the guest needs to resume. An application cannot freeze for less.
    #[serde(default)]
    pub stall_ms: f64,
    /// Time from the VM's request to the start of the copy.
    pub signalling_ms: f64,
    /// Time from the start of the copy to its end.
    pub copy_ms: f64,
    /// Time from the VM's request to the end of the migration.
    pub total_ms: f64,
    /// Reception of the stream at the destination after the migration, `native` or `relay`; `None`
    /// for plain libvirt and a failed migration.
    pub mode: Option<String>,
    /// True if the VM runs at the destination and receives the stream there.
    pub flows: bool,
    /// True if the migration must be exact: agents held the stream, in a network that carries it or
    /// with a relay that sends it.
    pub is_promised: bool,
    /// True if the stream flows and, for a migration that must be exact, nothing was lost, doubled
    /// or reordered ([`RunRow::judged`]).
    pub ok: bool,
    /// Continuity-counter errors, if the stream is MPEG-TS.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub continuity_errors: Option<u64>,
    /// Received minus sent packets, if the packets are identical. A positive number is the least
    /// number of doubled packets, a negative number the least number of lost packets.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub surplus: Option<i64>,
    /// Most packets that the VM lost because QEMU read them while the VM did not run, by the source's
    /// record, if the migration was cancelled.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub thrown_away_at_most: Option<u64>,
    /// Longest gap between answers in the TCP session that a correspondent opened to the guest's
    /// permanent address. This field and the next ones exist only with unicast mobility.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tcp_in_gap_ms: Option<f64>,
    /// Longest gap between answers in the TCP session that the guest opened.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tcp_out_gap_ms: Option<f64>,
    /// Number of the two sessions that broke.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub tcp_resets: Option<u64>,
    /// Longest gap between echo replies from the guest's permanent address.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ping_gap_ms: Option<f64>,
    /// Unanswered echo requests.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub ping_lost: Option<u64>,
    /// One row for each of several streams. The packet counts above are then sums, `loss_ms` and
    /// `freeze_ms` maxima.
    #[serde(skip_serializing_if = "Vec::is_empty", default)]
    pub streams: Vec<StreamRow>,
}

/// One of several streams that a guest receives during a migration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StreamRow {
    /// First multicast address of the stream.
    pub multicast_address: Ipv6Addr,
    /// True if the guest listens to the sender only (SSM).
    pub source_specific: bool,
    /// Rate of the stream in Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// Packets of the stream sent during the measurement.
    pub sent: u64,
    /// Packets of the stream that reached the application, each counted once.
    pub received: u64,
    /// Packets of the stream that never reached the application.
    pub lost: u64,
    /// Arrivals at the application beyond the first of each packet.
    pub duplicated: u64,
    /// Packets that arrived after a packet of the same flow with a higher number.
    pub reordered: u64,
    /// Lost packets divided by the stream's packet rate, milliseconds.
    pub loss_ms: f64,
    /// Longest time in which the application received nothing new of the stream, milliseconds.
    pub freeze_ms: f64,
    /// As [`RunRow::surplus`], for this stream.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub surplus: Option<i64>,
}

/// Longest time by which a gap may exceed the time in which the guest itself stands still,
/// milliseconds.
const BEYOND_MS: f64 = 100.0;

impl RunRow {
    /// Computes `ok` from the other fields.
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

    /// Returns true if all sessions by permanent addresses went on and no ping was lost; also
    /// without such sessions.
    #[must_use]
    pub fn keeps_sessions(&self) -> bool {
        self.sessions_go_on() && self.ping_lost.unwrap_or_default() == 0
    }

    /// Returns true if no session broke, and none stood still for long.
    ///
    /// Without KVM the guest does not run directly after the pause, because QEMU has translated
    /// none of its code yet. No application can answer while no thread runs, so this time then
    /// counts as pause.
    #[must_use]
    pub fn sessions_go_on(&self) -> bool {
        self.session_gap_ms()
            .is_none_or(|gap_ms| gap_ms <= self.still_ms() + BEYOND_MS)
            && self.tcp_resets.unwrap_or_default() == 0
    }

    /// Returns the longest gap of the sessions; `None` without sessions.
    #[must_use]
    pub fn session_gap_ms(&self) -> Option<f64> {
        let gaps = [self.tcp_in_gap_ms, self.tcp_out_gap_ms, self.ping_gap_ms];
        gaps.into_iter().flatten().max_by(f64::total_cmp)
    }

    /// Returns the longest time in which nothing in the guest could answer.
    #[must_use]
    pub fn still_ms(&self) -> f64 {
        self.vm_pause_ms.max(self.stall_ms)
    }

    /// Fills in the probe's metrics.
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

/// A change of the reception mode under a stream. Times are in milliseconds of the host's clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FlapRow {
    /// New mode: `relay` or `native`.
    pub to: String,
    /// Stream rate in Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// Packets sent from the change of the network to a second after the change of the mode.
    pub sent: u64,
    /// Packets that never reached the application.
    pub lost: u64,
    /// Arrivals at the application beyond the first of each packet.
    pub duplicated: u64,
    /// Packets that arrived after a packet of the same flow with a higher number.
    pub reordered: u64,
    /// Lost packets divided by the packet rate.
    pub loss_ms: f64,
    /// Longest time in which the application received nothing new.
    pub freeze_ms: f64,
    /// Time from the change of the network to the new mode.
    pub took_ms: f64,
}

impl FlapRow {
    /// Returns a row with the probe's metrics.
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

    /// Returns true if the change doubled nothing and, for a change to native reception, lost
    /// nothing.
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
