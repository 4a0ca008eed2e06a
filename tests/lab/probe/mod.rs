//! The stream probe: what the sender sends, what the guest received, and what follows from both.
//!
//! Everything is computed in the host's monotonic clock. The sender runs on the host and logs when
//! it sent each packet ([`log`]); the guest reports when it got each by its own clock, which stands
//! still while the guest is paused, and [`timeline`] makes host time of that.

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
