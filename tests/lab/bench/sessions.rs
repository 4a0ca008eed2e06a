//! Statistics of the sessions of a guest with a permanent address over its migrations.

use serde::{Deserialize, Serialize};

use super::median;
use crate::probe::report::RunRow;

/// Values over the migrations, milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// Median over the migrations.
    pub median: f64,
    /// Largest value.
    pub most: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        Self {
            median: median(values),
            most: values.iter().copied().max_by(f64::total_cmp).unwrap_or(0.0),
        }
    }
}

/// Sessions over the migrations of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sessions {
    /// Number of migrations with a measurement.
    pub moves: usize,
    /// Number of migrations that kept the sessions, as [`RunRow::keeps_sessions`] judges.
    pub kept: usize,
    /// Longest gap between answers in the TCP session that the correspondent opened.
    pub tcp_in_gap_ms: Spread,
    /// Longest gap between answers in the TCP session that the guest opened.
    pub tcp_out_gap_ms: Spread,
    /// Longest gap between echo replies.
    pub ping_gap_ms: Spread,
    /// Longest of the three gaps minus the VM's pause.
    pub beyond_pause_ms: Spread,
    /// Longest of the three gaps minus the time in which nothing in the guest ran: the pause, or
    /// the stall of a thread if the stall was longer.
    pub beyond_stall_ms: Spread,
    /// Unanswered echo requests in the worst migration.
    pub ping_lost: u64,
    /// Broken TCP sessions, over all migrations.
    pub tcp_resets: u64,
}

impl Sessions {
    /// Summarizes the migrations with a measurement; `None` if there are none.
    #[must_use]
    pub fn of(runs: &[RunRow]) -> Option<Self> {
        let rows: Vec<(&RunRow, f64)> = runs
            .iter()
            .filter_map(|row| Some((row, row.session_gap_ms()?)))
            .collect();
        if rows.is_empty() {
            return None;
        }
        let gaps = |of: fn(&RunRow) -> Option<f64>| {
            let values: Vec<f64> = rows.iter().filter_map(|(row, _)| of(row)).collect();
            Spread::of(&values)
        };
        let beyond = |of: fn(&RunRow) -> f64| {
            let values: Vec<f64> = rows.iter().map(|(row, gap)| gap - of(row)).collect();
            Spread::of(&values)
        };
        Some(Self {
            moves: rows.len(),
            kept: rows.iter().filter(|(row, _)| row.keeps_sessions()).count(),
            tcp_in_gap_ms: gaps(|row| row.tcp_in_gap_ms),
            tcp_out_gap_ms: gaps(|row| row.tcp_out_gap_ms),
            ping_gap_ms: gaps(|row| row.ping_gap_ms),
            beyond_pause_ms: beyond(|row| row.vm_pause_ms),
            beyond_stall_ms: beyond(RunRow::still_ms),
            ping_lost: rows
                .iter()
                .filter_map(|it| it.0.ping_lost)
                .max()
                .unwrap_or(0),
            tcp_resets: rows.iter().filter_map(|it| it.0.tcp_resets).sum(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(tcp_in: f64, tcp_out: f64, ping: f64, ping_lost: u64) -> RunRow {
        RunRow {
            vm_pause_ms: 50.0,
            stall_ms: 40.0,
            tcp_in_gap_ms: Some(tcp_in),
            tcp_out_gap_ms: Some(tcp_out),
            tcp_resets: Some(0),
            ping_gap_ms: Some(ping),
            ping_lost: Some(ping_lost),
            ..RunRow::default()
        }
    }

    #[test]
    fn moves_without_sessions_have_none() {
        assert_eq!(Sessions::of(&[]), None);
        assert_eq!(Sessions::of(&[RunRow::default()]), None);
    }

    #[test]
    fn median_and_worst_of_the_moves_are_told() {
        let spread = |median, most| Spread { median, most };
        let mut broken = row(400.0, 70.0, 90.0, 2);
        broken.stall_ms = 80.0;
        broken.tcp_resets = Some(1);
        let runs = [
            row(60.0, 70.0, 80.0, 0),
            RunRow::default(),
            row(61.0, 100.0, 60.0, 0),
            broken,
        ];
        let expected = Sessions {
            moves: 3,
            kept: 2,
            tcp_in_gap_ms: spread(61.0, 400.0),
            tcp_out_gap_ms: spread(70.0, 100.0),
            ping_gap_ms: spread(80.0, 90.0),
            beyond_pause_ms: spread(50.0, 350.0),
            beyond_stall_ms: spread(50.0, 320.0),
            ping_lost: 2,
            tcp_resets: 1,
        };
        assert_eq!(Sessions::of(&runs), Some(expected));
    }
}
