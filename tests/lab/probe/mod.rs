//! The stream probe: sent packets, received packets, and the metrics of both.
//!
//! All times are times of the host's monotonic clock. The sender runs on the host and logs the time
//! of each packet ([`log`]). The guest reports the arrival of each packet by its own clock, which
//! stands still while the guest is paused; [`timeline`] converts the guest's time to host time.
//!
//! | module | holds |
//! |---|---|
//! | [`clock`] | the host's monotonic clock |
//! | [`payload`], [`log`] | the stamp in each packet, and the sender's log |
//! | [`ffmpeg`], [`mpegts`] | traffic of a real player, and the check of its continuity counters |
//! | [`timeline`] | conversion of the guest's clock to the host's |
//! | [`metrics`], [`faults`] | losses, copies, reordering and freezes, and the packets concerned |
//! | [`counters`], [`places`] | packet counters of the kernels, and the places of the losses |
//! | [`path`] | the interfaces that each packet passed, and where it was overtaken |
//! | [`report`], [`picture`] | rows of runs as JSON, and pictures of migrations as SVG |
//! | [`eavesdropper`] | search for known bytes in all packets of a host |

pub mod clock;
pub mod counters;
pub mod eavesdropper;
pub mod faults;
pub mod ffmpeg;
pub mod log;
pub mod metrics;
pub mod mpegts;
pub mod path;
pub mod payload;
pub mod picture;
pub mod places;
pub mod report;
pub mod timeline;
