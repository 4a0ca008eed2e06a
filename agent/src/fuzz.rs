//! What must hold for any bytes, as functions of bytes: fuzz targets.
//!
//! libFuzzer calls them with what it makes up (`cargo xtask fuzz`), and the unit tests with all that it has
//! found so far, which is in `tests/fuzz`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "what fails here is what is looked for"
)]

mod role;
mod text;

use crate::proto::fuzz;

/// Name and body of a target.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("agent", fuzz::agent),
    ("adoption", fuzz::adoption),
    ("relay", fuzz::relay),
    ("relay_adoption", fuzz::relay_adoption),
    ("ims", fuzz::ims),
    ("directory", fuzz::directory),
    ("hold", fuzz::hold),
    ("unread", fuzz::unread),
    ("segments", fuzz::segments),
    ("placement", fuzz::placement),
    ("role", role::role),
    ("config", text::config),
    ("sdp", text::sdp),
    ("domain_xml", text::domain_xml),
    ("control", text::control),
    ("names", text::names),
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
