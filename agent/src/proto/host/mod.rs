//! This host: what it has, and what its VMs listen to.
//!
//! | module | holds |
//! |---|---|
//! | `inventory` | ports and domains |
//! | `listeners` | mirror of the kernel's listeners, and their ageing |
//! | `watch` | what the kernel reports of listeners, and what others are to do about it |
//! | `usage` | what VMs have used of their limits |

pub(super) mod inventory;
pub(super) mod listeners;
pub(super) mod usage;
mod watch;
