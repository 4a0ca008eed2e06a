//! The stream probe: sent packets, received packets, and the metrics of both.
//!
//! All times are times of the host's monotonic clock. The sender runs on the host and logs when it
//! sent each packet ([`log`]). The guest reports when it received each packet by its own clock,
//! which stands still while the guest is paused; [`timeline`] converts the guest's time to host
//! time.

pub mod clock;
pub mod counters;
pub mod eavesdropper;
pub mod faults;
pub mod ffmpeg;
pub mod log;
pub mod metrics;
pub mod mpegts;
pub mod payload;
pub mod picture;
pub mod places;
pub mod report;
pub mod timeline;
