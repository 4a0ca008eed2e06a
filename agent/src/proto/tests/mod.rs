//! Two agents on a virtual clock, and what the tests of single files share.

mod crash;
pub(super) mod fixture;
mod migration;
mod pair;
