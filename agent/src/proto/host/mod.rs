//! State of this host: ports, domains, and the listeners of the VMs.
//!
//! | module | holds |
//! |---|---|
//! | `inventory` | ports and domains |
//! | `listeners` | mirror of the kernel's listeners, and their ageing |
//! | `watch` | kernel's events about listeners, and their effects on other modules |
//! | `usage` | VMs' usage of their limits |

pub(super) mod inventory;
pub(super) mod listeners;
pub(super) mod usage;
mod watch;
