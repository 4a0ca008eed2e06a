//! Converts the guest's clock to the host's clock.
//!
//! Only the guest knows when a packet came out of the application's socket. Two effects separate
//! the guest's report from host time:
//!
//! - **The guest's monotonic clock stands still while the guest is paused**, so a gap in guest time
//!   lacks the pause.
//! - **The control channel is slow around a migration.** A report usually takes less than a tenth
//!   of a millisecond. The first reports after the resume at the destination have taken 14 to 63 ms
//!   on a quiet machine and 287 ms on a busy one: they pass the guest's driver, QEMU's main loop
//!   and a socket, none of which has run at the destination before. The time at which the host
//!   receives a report is therefore no measure of a freeze.
//!
//! The guest stamps each report with its own time, and the fastest reports serve to compare both
//! clocks. While the guest runs, its clock is as fast as the host's, and the smallest difference
//! between the times of receiving and stamping is the difference of the clocks. Of the thousand
//! reports of a second, the fastest takes 0.06 ms ± 0.02 ms, both before and after a migration. The
//! growth of this difference over a migration is the time for which the guest's clock stood still.
//!
//! ```text
//! host  ----|-|--|-|--|-|...............|............|-|--|-|---  reports are received
//! guest ----|-|--|-|--|-|           |-------|-|--|-|---------     reports are stamped
//!                        \         /
//!                         the clock stands still
//! ```
//!
//! A stretch is the time between two migrations: the reports that arrived by one VM host. The guest
//! may stamp a report before a migration and write the report after the migration. A report stamped
//! within 3 ms after the last report by the source counts as such a report. Repeated reports say
//! nothing about the clocks.
//!
//! The remaining error is the millisecond between two reads of the receiver's socket.

use std::collections::BTreeMap;

/// A report stamped within this time after the last report by the source was stamped before the
/// pause: twice the time between two reports of a stream.
const LATE_NS: u64 = 3_000_000;
/// Length of a period. The clocks are compared for each period, to follow a drift.
const PERIOD_NS: u64 = 1_000_000_000;
/// Number of periods before and after a period whose reports count too. On a busy machine all
/// reports of some seconds are late, and a jump of the difference would change the order of
/// packets.
const AROUND: u64 = 10;
/// Highest drift of the clocks in a period, nanoseconds.
const DRIFT_NS: i64 = 100_000;

/// Times at which a report was stamped and received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Number of the frame, counted by the guest since its boot.
    pub number: u32,
    /// Time of stamping, in nanoseconds of the guest's monotonic clock.
    pub guest_ns: u64,
    /// Time of receiving, in nanoseconds of the host's monotonic clock.
    pub host_ns: u64,
    /// Index of the VM host by which the report arrived.
    pub host: u8,
}

/// Host time and place of the guest at a time of the guest's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    /// Host time, in nanoseconds of the host's monotonic clock.
    pub host_ns: u64,
    /// Index of the VM host on which the guest ran.
    pub host: u8,
}

/// The time between two migrations, which the guest spends on one VM host.
#[derive(Clone, Debug)]
struct Stretch {
    host: u8,
    /// Time of the last report, in nanoseconds of the guest's clock.
    last_ns: u64,
    /// Smallest difference of the clocks, by period of the guest's clock.
    differences: BTreeMap<u64, i64>,
}

impl Stretch {
    fn new(host: u8) -> Self {
        Self {
            host,
            last_ns: 0,
            differences: BTreeMap::new(),
        }
    }

    fn add(&mut self, report: &Report) {
        self.last_ns = self.last_ns.max(report.guest_ns);
        let difference = report.host_ns as i64 - report.guest_ns as i64;
        self.differences
            .entry(report.guest_ns / PERIOD_NS)
            .and_modify(|least| *least = difference.min(*least))
            .or_insert(difference);
    }

    /// Returns the host's clock minus the guest's at a time of the guest's clock: the smallest
    /// difference of this period and of [`AROUND`] periods before and after, where each period
    /// beyond the neighbours adds [`DRIFT_NS`]. If none of them has a report, the last earlier
    /// period counts, otherwise the first later one.
    fn difference(&self, guest_ns: u64) -> i64 {
        let period = guest_ns / PERIOD_NS;
        let around = self
            .differences
            .range(period.saturating_sub(AROUND)..=period + AROUND)
            .map(|(other, least)| {
                least + other.abs_diff(period).saturating_sub(1) as i64 * DRIFT_NS
            })
            .min();
        let before = || self.differences.range(..period).next_back();
        let after = || self.differences.range(period..).next();
        around
            .or_else(|| before().or_else(after).map(|(_, least)| *least))
            .unwrap_or_default()
    }
}

/// The guest's clock over its stay on several VM hosts.
#[derive(Clone, Debug, Default)]
pub struct Timeline {
    stretches: Vec<Stretch>,
}

impl Timeline {
    /// Compares the clocks. `reports` must be in the order of their numbers, without repeated
    /// reports.
    pub fn new(reports: &[Report]) -> Self {
        let mut stretches: Vec<Stretch> = Vec::new();
        for report in reports {
            match stretches.last_mut() {
                Some(stretch) if stretch.host == report.host => stretch.add(report),
                Some(stretch) if report.guest_ns <= stretch.last_ns + LATE_NS => {
                    stretch.last_ns = stretch.last_ns.max(report.guest_ns);
                }
                _ => {
                    let mut stretch = Stretch::new(report.host);
                    stretch.add(report);
                    stretches.push(stretch);
                }
            }
        }
        Self { stretches }
    }

    /// Returns host time and VM host of the guest at the time `guest_ns` of the guest's clock.
    /// Without reports, both clocks count as equal.
    pub fn at(&self, guest_ns: u64) -> Moment {
        let is_over = |stretch: &Stretch| stretch.last_ns + LATE_NS < guest_ns;
        let index = self.stretches.partition_point(is_over);
        let last = self.stretches.len().saturating_sub(1);
        let Some(stretch) = self.stretches.get(index.min(last)) else {
            return Moment {
                host_ns: guest_ns,
                host: 0,
            };
        };
        Moment {
            host_ns: guest_ns.saturating_add_signed(stretch.difference(guest_ns)),
            host: stretch.host,
        }
    }

    /// Returns the time and the duration of the clock's stop in each migration, in nanoseconds of
    /// the host's clock. The time is that of the last report before the stop.
    pub fn stops(&self) -> Vec<(u64, u64)> {
        let pairs = self.stretches.iter().zip(self.stretches.iter().skip(1));
        let stop = |(before, after): (&Stretch, &Stretch)| {
            let last_ns = before.last_ns;
            let difference = before.difference(last_ns);
            let stopped_ns = last_ns.saturating_add_signed(difference);
            let first = after
                .differences
                .keys()
                .next()
                .map(|period| period * PERIOD_NS);
            let grown = after.difference(first.unwrap_or(last_ns)) - difference;
            (stopped_ns, u64::try_from(grown).unwrap_or_default())
        };
        pairs.map(stop).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    /// The host's clock minus the guest's, at the source.
    const APART: u64 = 5_000_000 * MS;
    /// Time for which the guest's clock stands still, nanoseconds.
    const STOP: u64 = 170 * MS;

    /// Returns a report for each 1.2 ms of the guest's clock from `from_ns` on. The channel needs
    /// `delay` for each report.
    fn reports(
        numbers: std::ops::Range<u32>,
        from_ns: u64,
        host: u8,
        delay: impl Fn(u64) -> u64,
    ) -> Vec<Report> {
        let apart = APART + if host == 1 { STOP } else { 0 };
        let mut previous_ns = 0;
        numbers
            .enumerate()
            .map(|(index, number)| {
                let guest_ns = from_ns + index as u64 * 1_200_000;
                // The channel keeps the order.
                previous_ns = previous_ns.max(guest_ns + apart + delay(guest_ns));
                Report {
                    number,
                    guest_ns,
                    host_ns: previous_ns,
                    host,
                }
            })
            .collect()
    }

    /// Returns a usual delay: 0.06 ms and more.
    fn usual(guest_ns: u64) -> u64 {
        60_000 + guest_ns / 7 % 400_000
    }

    fn near(a: u64, b: u64) -> bool {
        a.abs_diff(b) < 100_000
    }

    #[test]
    fn channel_that_stands_still_after_a_move_does_not_lengthen_a_freeze() {
        // The source's last report has the time 1198.8 ms. The guest resumes at 1200 ms and
        // receives at 1230 ms, but no report arrives for a tenth of a second.
        let mut all = reports(0..1000, 0, 0, usual);
        let resumed = APART + STOP + 1200 * MS;
        let stalled = |guest_ns| {
            let possible = resumed + 100 * MS;
            possible
                .saturating_sub(guest_ns + APART + STOP)
                .max(usual(guest_ns))
        };
        all.extend(reports(1000..2000, 1230 * MS, 1, stalled));
        let timeline = Timeline::new(&all);
        let (last, first) = (timeline.at(1_198_800_000), timeline.at(1230 * MS));
        assert_eq!((last.host, first.host), (0, 1));
        let freeze = first.host_ns - last.host_ns;
        assert!(near(freeze, STOP + 31_200_000), "{freeze}");
        // The times of receiving would give 70 ms more.
        let received = all[1000].host_ns - all[999].host_ns;
        assert!(received > freeze + 65 * MS, "{received}");
        let [(stopped_ns, stood)] = timeline.stops()[..] else {
            panic!("{timeline:?}");
        };
        assert!(near(stood, STOP), "{stood}");
        assert!(near(stopped_ns, APART + 1_198_800_000), "{stopped_ns}");
    }

    #[test]
    fn report_that_was_stamped_before_the_pause_belongs_there() {
        let mut all = reports(0..1000, 0, 0, usual);
        // The guest stamps the report at 1200 ms, just before the pause, and writes it afterwards.
        all.extend(reports(1000..1001, 1200 * MS, 1, |_| 35 * MS));
        all.extend(reports(1001..2000, 1235 * MS, 1, usual));
        let timeline = Timeline::new(&all);
        let (last, first) = (timeline.at(1200 * MS), timeline.at(1235 * MS));
        assert_eq!((last.host, first.host), (0, 1));
        assert!(near(first.host_ns - last.host_ns, STOP + 35 * MS));
    }

    #[test]
    fn clocks_that_drift_apart_are_followed() {
        // 50 ppm over ten minutes are 30 ms.
        let reports: Vec<_> = (0..60_000u32)
            .map(|number| {
                let guest_ns = u64::from(number) * 10 * MS;
                Report {
                    number,
                    guest_ns,
                    host_ns: APART + guest_ns + guest_ns / 20_000 + usual(guest_ns),
                    host: 0,
                }
            })
            .collect();
        let timeline = Timeline::new(&reports);
        for guest_ns in [0, 300_000 * MS, 599_000 * MS] {
            let expected = APART + guest_ns + guest_ns / 20_000;
            let found = timeline.at(guest_ns).host_ns;
            assert!(found.abs_diff(expected) < 200_000, "{found} {expected}");
        }
    }

    #[test]
    fn seconds_in_which_every_report_is_late_change_no_order() {
        // From the second to the fifth second no report is written.
        let late = |guest_ns: u64| (5000 * MS).saturating_sub(guest_ns.max(2000 * MS));
        let delay = |guest_ns: u64| match guest_ns / MS {
            2000..5000 => late(guest_ns),
            _ => usual(guest_ns),
        };
        let timeline = Timeline::new(&reports(0..8000, 0, 0, delay));
        let times: Vec<u64> = (0..9600).map(|ms| timeline.at(ms * MS).host_ns).collect();
        assert!(times.is_sorted());
        let found = timeline.at(3500 * MS).host_ns;
        assert!(found.abs_diff(APART + 3500 * MS) < MS, "{found}");
    }

    #[test]
    fn moves_to_and_fro_are_stretches_of_their_own() {
        let mut all = reports(0..100, 0, 0, usual);
        all.extend(reports(100..200, 200 * MS, 1, usual));
        let mut back = reports(200..300, 400 * MS, 0, usual);
        for report in &mut back {
            report.host_ns += 2 * STOP;
        }
        all.extend(back);
        let timeline = Timeline::new(&all);
        let hosts = [50, 250, 450].map(|ms| timeline.at(ms * MS).host);
        assert_eq!(hosts, [0, 1, 0]);
        let stops: Vec<u64> = timeline.stops().iter().map(|(_, stood)| *stood).collect();
        assert!(stops.iter().all(|stood| near(*stood, STOP)), "{stops:?}");
    }

    #[test]
    fn without_reports_the_clocks_are_taken_for_the_same() {
        let moment = Timeline::default().at(7);
        assert_eq!((moment.host_ns, moment.host), (7, 0));
    }
}
