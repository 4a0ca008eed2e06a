//! Fixtures that the tests of several crates share (feature `testing`).
//!
//! | module | contents |
//! |---|---|
//! | [`frame`] | frames of a guest, field by field, without the parsers that they test |
//! | [`store`] | listener tables in memory |
//! | [`corpus`] | fuzzing results as ordinary tests |

pub mod corpus;
pub mod frame;
pub mod store;
