//! Paths of the lab's own programs.
//!
//! cargo builds the programs into the directory of the running program (`cargo xtask`) or into the
//! directory above (`cargo test`, whose programs are in `deps/`).

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Returns the path of a program of this workspace, such as `lab-node`.
///
/// # Errors
///
/// When the program has not been built.
pub fn path(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().context("Failed to find the running program's own path")?;
    for directory in own.ancestors().skip(1).take(2) {
        let candidate = directory.join(name);
        if candidate.is_file() {
            return Ok(candidate);
        }
    }
    bail!(
        "{name} is not built next to {}: run `cargo build --workspace --bins` first",
        own.display()
    )
}
