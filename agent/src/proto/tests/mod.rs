//! Two agents on a virtual clock.

mod crash;
mod migration;
mod pair;
