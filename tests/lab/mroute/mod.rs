//! Multicast routing of the lab's router: the kernel forwards, and a small daemon sets its routes.
//!
//! The access switch of a site knows the listeners of the site. The kernel's bridge is the MLD
//! querier there, runs the timers of RFC 9777 for each port, and reports changes of its multicast
//! database by netlink. The daemon combines these changes with the kernel's upcalls for unknown
//! flows into (source, multicast address) routes:
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
//! | [`mdb`] | reading a bridge's multicast database |
//! | `socket` | the kernel's multicast routing socket |
//! | [`daemon`] | the event loop |
//! | [`control`] | queries and changes of the running daemon |

pub mod control;
pub mod daemon;
pub mod event;
pub mod mdb;
mod socket;
pub mod tree;
