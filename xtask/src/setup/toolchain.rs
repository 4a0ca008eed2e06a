//! Installs Rust toolchains, bpf-linker and cargo-deny.
//!
//! The kernel programs need `core` for `bpfel-unknown-none`. The step tries two toolchains in this
//! order:
//!
//! 1. a nightly toolchain with `rust-src`, which builds `core` itself;
//! 2. Debian's `rustc-web` with `libstd-rust-web-dev-bpf`, linked as the toolchain `bpf-debian`.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use super::Step;
use super::packages::output;

/// rustup's name for the toolchain with Debian's compiler.
const LINKED: &str = "bpf-debian";
/// First version that links the output of LLVM 22.
const LINKER_VERSION: &str = "0.13.0";
const LLVM: &str = "/usr/lib/llvm-22";
/// Version of cargo-deny to install if there is none.
const DENY_VERSION: &str = "0.20.2";

/// Checks rustfmt and clippy.
pub(super) fn host() -> Result<Option<Step>> {
    if !found("rustup") {
        bail!("rustup is not installed: get it from https://rustup.rs, then run this again");
    }
    let mut components = Vec::new();
    for (program, component) in [("rustfmt", "rustfmt"), ("cargo-clippy", "clippy")] {
        if !found(program) {
            components.push(component);
        }
    }
    if components.is_empty() {
        return Ok(None);
    }
    let mut command = Command::new("rustup");
    command.args(["component", "add"]).args(&components);
    Ok(Some(Step {
        summary: format!(
            "Rust components for `cargo xtask lint`: {}",
            components.join(", ")
        ),
        commands: vec![("install them".to_owned(), command)],
    }))
}

/// Links Debian's compiler as a toolchain, unless a toolchain that can build for BPF exists.
/// Debian's compiler has no cargo and rustup would warn at each build, so the linked toolchain gets
/// this machine's cargo.
pub(super) fn bpf() -> Result<Option<Step>> {
    if nightly_with_source().is_some() || is_linked() {
        return Ok(None);
    }
    if !Path::new("/usr/lib/rustlib/bpfel-unknown-none").exists() {
        bail!(
            "No toolchain can build for BPF: install one with `rustup toolchain install nightly \
             --component rust-src`, then run this again"
        );
    }
    let Some(data) = data_home() else {
        bail!("Neither XDG_DATA_HOME nor HOME is set: set HOME, then run this again");
    };
    let directory = data.join("roamcast").join(LINKED);
    let programs = directory.join("bin");
    let cargo = output("rustup", &["which", "cargo"])?;
    let mut make = Command::new("mkdir");
    make.arg("-p").arg(&programs);
    let link = |from: &Path, to: PathBuf| {
        let mut command = Command::new("ln");
        command.args(["-s", "-f", "-n"]).arg(from).arg(to);
        command
    };
    let mut toolchain = Command::new("rustup");
    toolchain
        .args(["toolchain", "link", LINKED])
        .arg(&directory);
    let commands = [
        make,
        link(Path::new("/usr/lib"), directory.join("lib")),
        link(Path::new("/usr/bin/rustc"), programs.join("rustc")),
        link(Path::new(cargo.trim()), programs.join("cargo")),
        toolchain,
    ];
    Ok(Some(Step {
        summary: format!("Debian's Rust with the BPF target, as the toolchain {LINKED}"),
        commands: commands
            .map(|command| ("link it".to_owned(), command))
            .into(),
    }))
}

/// Returns true if Debian's compiler is linked as a toolchain with a cargo.
fn is_linked() -> bool {
    rustup_home().is_some_and(|home| {
        let programs = home.join("toolchains").join(LINKED).join("bin");
        programs.join("rustc").exists() && programs.join("cargo").exists()
    })
}

/// Installs bpf-linker, unless a new enough version is installed.
pub(super) fn linker() -> Result<Option<Step>> {
    if output("bpf-linker", &["--version"]).is_ok_and(|text| new_enough(&text)) {
        return Ok(None);
    }
    if !Path::new(LLVM).exists() {
        bail!(
            "bpf-linker {LINKER_VERSION} or newer is missing, and so is LLVM 22 to build it with: \
             install your system's bpf-linker, then run this again"
        );
    }
    let mut command = Command::new("cargo");
    command.env("LLVM_PREFIX", LLVM);
    command.args([
        "install",
        "bpf-linker",
        "--version",
        LINKER_VERSION,
        "--locked",
        "--force",
    ]);
    command.args(["--no-default-features", "--features", "llvm-22"]);
    Ok(Some(Step {
        summary: format!("bpf-linker {LINKER_VERSION}: it links the kernel programs"),
        commands: vec![("build bpf-linker, a minute or two".to_owned(), command)],
    }))
}

/// Installs cargo-deny, unless it is installed. The build is not optimized, because optimizing
/// takes a minute and cargo-deny only reads some files.
pub(super) fn deny() -> Result<Option<Step>> {
    if found("cargo-deny") {
        return Ok(None);
    }
    let mut command = Command::new("cargo");
    command.args(["install", "cargo-deny", "--version", DENY_VERSION]);
    command.args(["--locked", "--debug"]);
    Ok(Some(Step {
        summary: format!(
            "cargo-deny {DENY_VERSION}: `cargo xtask lint` checks licences, versions and sources with it"
        ),
        commands: vec![("build cargo-deny, a minute or two".to_owned(), command)],
    }))
}

/// Returns a sentence that names the toolchain for the kernel programs.
pub(super) fn chosen() -> String {
    match nightly_with_source() {
        Some(name) => format!("The kernel programs are built by {name} with rust-src."),
        None => format!("The kernel programs are built by the toolchain {LINKED}."),
    }
}

/// Returns the name of a nightly toolchain with the sources of `core`.
fn nightly_with_source() -> Option<String> {
    let home = rustup_home()?;
    toolchains()
        .into_iter()
        .filter(|name| name.starts_with("nightly"))
        .find(|name| {
            home.join("toolchains")
                .join(name)
                .join("lib/rustlib/src/rust/library/core")
                .exists()
        })
}

/// Returns the names of the installed toolchains, from their directory, because `rustup` starts
/// slowly.
fn toolchains() -> Vec<String> {
    let Some(home) = rustup_home() else {
        return Vec::new();
    };
    std::fs::read_dir(home.join("toolchains"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

fn rustup_home() -> Option<PathBuf> {
    directory("RUSTUP_HOME", ".rustup")
}

/// Returns the directory for a user's data (XDG Base Directory Specification).
fn data_home() -> Option<PathBuf> {
    directory("XDG_DATA_HOME", ".local/share")
}

/// Returns the directory that a variable names, or the user's default.
fn directory(variable: &str, own: &str) -> Option<PathBuf> {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(own)))
}

/// Returns true if a program is in the search path.
fn found(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// Parses `bpf-linker X.Y.Z`. Returns true if the version is at least [`LINKER_VERSION`].
fn new_enough(version: &str) -> bool {
    let numbers = |text: &str| -> Vec<u32> {
        text.split('.')
            .map_while(|number| number.trim().parse().ok())
            .collect()
    };
    let own = version
        .split_whitespace()
        .nth(1)
        .map(numbers)
        .unwrap_or_default();
    !own.is_empty() && own >= numbers(LINKER_VERSION)
}

#[cfg(test)]
mod tests {
    use super::new_enough;

    #[test]
    fn only_linkers_of_at_least_the_needed_version_are_enough() {
        assert!(new_enough("bpf-linker 0.13.0"));
        assert!(new_enough("bpf-linker 1.0.0\n"));
        assert!(!new_enough("bpf-linker 0.9.14"));
        assert!(!new_enough(""));
    }
}
