//! Fuzzing results as ordinary tests: `tests/fuzz/corpus` has an input for each code path of a
//! target, `tests/fuzz/crashes` the inputs that violated an invariant.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what fails here is the test that asked for it"
)]

use std::path::PathBuf;
use std::vec::Vec;
use std::{env, fs};

/// Function under test, which takes one input.
pub type Body = fn(&[u8]);

/// Runs each target, selected by name, on all of its inputs.
pub fn replay(targets: &[(&str, Body)]) {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz");
    for (name, run) in targets {
        let mut inputs: Vec<PathBuf> = ["corpus", "crashes"]
            .iter()
            .filter_map(|kind| fs::read_dir(root.join(kind).join(name)).ok())
            .flatten()
            .map(|entry| entry.unwrap().path())
            .collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "{name} has no corpus");
        for input in inputs {
            // A panic message does not name the input, so print the input first.
            std::println!("{}", input.display());
            run(&fs::read(&input).unwrap());
        }
    }
}
