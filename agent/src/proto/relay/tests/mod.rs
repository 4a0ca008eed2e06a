//! A relay on a virtual clock, with a kernel and agents in memory.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "what fails here is the test that asked for it"
)]
#![cfg_attr(
    fuzzing,
    allow(dead_code, unused_imports, reason = "fuzzing takes a part of it")
)]

#[cfg(test)]
mod adoption;
mod fixture;
pub(in crate::proto) mod fuzz;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod random;
#[cfg(test)]
mod session;
