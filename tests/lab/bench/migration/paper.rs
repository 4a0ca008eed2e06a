//! Results of the paper's authors (their section 5), in seconds.
//!
//! The authors define outage as the part of a stream that was lost, by sequence numbers. They
//! measured the outage of a plain live migration by ping6 every 10 ms. Figures 10 and 11 have no
//! numbers.

use super::{Load, Span};

/// Mean outage of a plain live migration within a subnet (Fig. 8).
pub const LM_OUTAGE: f64 = 0.12;
/// Mean outage over all sizes of memory (Fig. 8).
pub const GLM_OUTAGE: f64 = 0.18;

/// Memory in MiB, and minimum, average and maximum at 2 Mbit/s and at 20 Mbit/s (Table 3).
const OUTAGES: [(u32, [f64; 3], [f64; 3]); 4] = [
    (128, [0.00, 0.19, 0.37], [0.10, 0.14, 0.22]),
    (256, [0.15, 0.21, 0.39], [0.11, 0.16, 0.20]),
    (512, [0.10, 0.22, 0.37], [0.08, 0.17, 0.36]),
    (1024, [0.11, 0.20, 0.37], [0.07, 0.16, 0.32]),
];

/// Returns the outage of Table 3 under a load, without a median; `None` if the authors did not
/// measure the load.
#[must_use]
pub fn outage(load: Load) -> Option<Span> {
    let (_, at_2, at_20) = OUTAGES
        .iter()
        .find(|(memory_mib, ..)| *memory_mib == load.memory_mib)?;
    let is = |rate: f64| (load.rate_mbps - rate).abs() < f64::EPSILON;
    let [min, mean, max] = match () {
        () if is(2.0) => *at_2,
        () if is(20.0) => *at_20,
        () => return None,
    };
    Some(Span {
        min,
        mean,
        median: f64::NAN,
        max,
    })
}
