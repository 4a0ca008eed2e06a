//! Multicast routing of the lab's router: the kernel forwards, a small daemon decides where to.
//!
//! Who listens at a site is taken from that site's access switch: the kernel's bridge is the MLD
//! querier there, runs the timers of RFC 9777 per port, and tells each change of its multicast
//! database by netlink. The daemon turns that and the kernel's upcalls for unknown flows into
//! (source, multicast address) routes:
//!
//! ```text
//!  switch1 MDB --RTM_NEWMDB--+                         +--> MRT6_ADD_MFC
//!  switch2 MDB --RTM_DELMDB--+--> tree (decides) ------+
//!  router  -----NOCACHE------+    growth delay per site +--> event log (JSON lines)
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`tree`] | who gets what and from when; no I/O, no clock |
//! | [`event`] | flows, and what is done and logged for them |
//! | [`mdb`] | reading a bridge's multicast database |
//! | `socket` | the kernel's multicast routing socket |
//! | [`daemon`] | the loop that ties them together |
//! | [`control`] | asking and changing the running daemon |

pub mod control;
pub mod daemon;
pub mod event;
pub mod mdb;
mod socket;
pub mod tree;
