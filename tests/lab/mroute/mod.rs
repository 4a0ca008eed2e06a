//! Multicast routing of the lab's router: the kernel forwards packets, and a small daemon installs
//! the kernel's routes.
//!
//! The access switch of a site knows the listeners of the site. The switch is a bridge of the
//! kernel: the MLD querier of the site, which runs the timers of RFC 9777 for each port and reports
//! changes of its multicast database (MDB) by netlink. The daemon combines these changes with the
//! kernel's upcalls for unknown flows into (source, multicast address) routes:
//!
//! ```text
//!  switch1 MDB --RTM_NEWMDB--+                         +--> MRT6_ADD_MFC
//!  switch2 MDB --RTM_DELMDB--+--> tree (decides) ------+
//!  router  -----NOCACHE------+    growth delay per site +--> event log (JSON lines)
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`tree`] | the decisions: which site receives which flow, and from when; no I/O, no clock |
//! | [`event`] | flows, actions and logged events |
//! | [`mdb`] | changes and dumps of a bridge's multicast database |
//! | `socket` | the kernel's multicast routing socket |
//! | [`daemon`] | the event loop |
//! | [`control`] | control socket: queries of the daemon's state, and changes of a site's kind |

pub mod control;
pub mod daemon;
pub mod event;
pub mod mdb;
mod socket;
pub mod tree;
