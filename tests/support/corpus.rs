//! What fuzzing has found, as ordinary tests: `tests/fuzz/corpus` has an input for each way through a target,
//! `tests/fuzz/crashes` those that something did not hold for.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what fails here is the test that asked for it"
)]

use std::path::PathBuf;
use std::vec::Vec;
use std::{env, fs};

/// What takes an input.
type Body = fn(&[u8]);

/// Runs each target, by its name, with all of its inputs.
pub(crate) fn replay(targets: &[(&str, Body)]) {
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
            // A panic says nothing of the input, but the last line that was printed does.
            std::println!("{}", input.display());
            run(&fs::read(&input).unwrap());
        }
    }
}
