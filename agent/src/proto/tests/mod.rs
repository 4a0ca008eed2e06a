//! Two agents on a virtual clock, and what the tests of single files share.

mod crash;
pub(super) mod fixture;
mod kernel;
mod migration;
mod pair;
mod schedule;
mod vm_host;
