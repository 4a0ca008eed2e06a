//! Fuzz targets: properties that hold for any input bytes.
//!
//! libFuzzer calls the targets with generated inputs (`cargo xtask fuzz`); the unit tests call them
//! with the corpus in `tests/fuzz`.

use crate::{client, node};

/// Name of a target's corpus folder, and the target.
pub type Target = (&'static str, fn(&[u8]));

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    ("client", client::fuzz::run),
    ("node", node::fuzz::run),
    ("key_file", node::fuzz::key_file),
    ("node_control", node::fuzz::control),
];

#[cfg(test)]
mod tests {
    use common::testing::corpus;

    use super::*;

    #[test]
    fn all_inputs_that_were_found_are_taken() {
        corpus::replay(TARGETS);
    }
}
