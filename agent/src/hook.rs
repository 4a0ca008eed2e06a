//! libvirt's hook: `roamcast hook`.
//!
//! libvirt runs the programs in `qemu.d/` below its directory of hooks (libvirt 6.5 and newer), and
//! waits for them. `roamcast hook install` puts a script there that runs `roamcast hook run` when a
//! migration begins to come in, before QEMU is started for it. That is in time to prepare for a domain
//! that somebody else moves, as for one of Roamcast's own moves.
//!
//! A hook may not fail, since that would fail the migration, nor print, since that would replace the
//! domain's XML, nor call libvirt, which waits for it. It has an end: [`BOUND`].
//!
//! | module | holds |
//! |---|---|
//! | [`install`] | the script |
//! | [`run`](mod@run) | what it runs |

pub mod install;
pub mod run;

use std::time::Duration;

/// Longest time that libvirt is kept waiting.
pub const BOUND: Duration = Duration::from_secs(5);
