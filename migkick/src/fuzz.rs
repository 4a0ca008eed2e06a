//! What must hold for any bytes, as functions of bytes: fuzz targets.
//!
//! libFuzzer calls them with what it makes up (`cargo xtask fuzz`), and the unit tests with all that it has
//! found so far, which is in `tests/fuzz`.

use crate::{client, node};

/// Name and body of a target.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("client", client::fuzz::run),
    ("node", node::fuzz::run),
    ("key_file", node::fuzz::key_file),
    ("node_control", node::fuzz::control),
];

#[cfg(test)]
#[path = "../../tests/support/corpus.rs"]
mod corpus;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_inputs_that_were_found_are_taken() {
        corpus::replay(TARGETS);
    }
}
