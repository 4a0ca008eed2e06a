//! libvirt's hook: `roamcast hook`.
//!
//! libvirt (6.5 and newer) runs the programs in `qemu.d/` below its directory of hooks and waits
//! for them. `roamcast hook install` puts a script there, which runs `roamcast hook run` when an
//! incoming migration begins, before libvirt starts QEMU. The agent can thus prepare for a domain
//! that somebody else migrates, as it does for a migration of its own.
//!
//! A hook has three constraints. A failure would fail the migration. Output would replace the
//! domain's XML. A call to libvirt would deadlock, because libvirt waits for the hook. [`BOUND`]
//! limits the time of the hook.
//!
//! | module | holds |
//! |---|---|
//! | [`install`] | the script |
//! | [`run`](mod@run) | the program that the script runs |

pub mod install;
pub mod run;

use std::time::Duration;

/// Longest time for which the hook delays libvirt.
pub const BOUND: Duration = Duration::from_secs(5);
