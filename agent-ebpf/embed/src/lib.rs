//! Builds the objects of the kernel programs into `OUT_DIR`, for the build scripts of the packages that
//! embed the objects.
//!
//! The build needs a toolchain with `core` for the BPF target. `ROAMCAST_BPF_TOOLCHAIN` names the
//! toolchain; the default is `bpf-debian` (Debian's `rustc-web`, which ships `core` prebuilt), then
//! `nightly` with `rust-src`, which builds `core`.

#![allow(unsafe_code, reason = "setting an environment variable is unsafe")]

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

use anyhow::{Context, Result};
use aya_build::{Package, Toolchain};

/// Name of Debian's compiler in `rustup toolchain link`.
const DEBIAN: &str = "bpf-debian";
const NIGHTLY: &str = "nightly";
/// Crates that may use an unstable feature, inline assembly for BPF: aya-ebpf and agent-ebpf. The
/// value "1" would make aya-build rebuild `core` even when the toolchain ships it. The build script
/// sets the variable for the inner cargo only, because some dependencies rebuild for each value.
const BOOTSTRAP: &str = "aya_ebpf,agent_ebpf";

/// An object that is built with one more feature.
#[derive(Clone, Copy, Debug)]
pub struct Variant<'a> {
    /// File name in `OUT_DIR`.
    pub name: &'a str,
    /// Name of the object without the feature.
    pub object: &'a str,
    /// Feature of `agent-ebpf` that makes the variant.
    pub feature: &'a str,
}

/// Builds the objects and variants into `OUT_DIR`, and passes the name of the toolchain to the
/// crate. Call from a build script.
///
/// # Errors
///
/// No toolchain builds the programs, or `OUT_DIR` cannot be written.
pub fn embed(objects: &[&str], variants: &[Variant<'_>]) -> Result<()> {
    println!("cargo::rerun-if-env-changed=ROAMCAST_BPF_TOOLCHAIN");
    println!("cargo::rerun-if-changed=../common/src");
    println!("cargo::rerun-if-changed=build.rs");

    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    if env::var_os("CARGO_CFG_FUZZING").is_some() {
        // Fuzzing loads no programs.
        let names = variants.iter().map(|variant| variant.name);
        for name in names.chain(objects.iter().copied()) {
            fs::write(out.join(name), [])?;
        }
        println!("cargo::rustc-env=ROAMCAST_BPF_TOOLCHAIN_USED=none");
        return Ok(());
    }
    let toolchain = toolchain();
    // SAFETY: the build script has one thread.
    unsafe {
        env::set_var("RUSTC_BOOTSTRAP", BOOTSTRAP);
        // aya-build prints all output of the inner cargo as warnings.
        env::set_var("CARGO_TERM_QUIET", "true");
    }
    println!("eBPF toolchain: {toolchain}");
    println!("cargo::rustc-env=ROAMCAST_BPF_TOOLCHAIN_USED={toolchain}");

    for variant in variants {
        build(&toolchain, &[variant.object, variant.feature])?;
        // The build without the feature reuses the file name.
        let (from, to) = (out.join(variant.object), out.join(variant.name));
        fs::rename(&from, &to)
            .with_context(|| format!("Cannot move {} to {}", from.display(), to.display()))?;
    }
    build(&toolchain, objects)
}

/// Builds the objects of the given features into `OUT_DIR`.
fn build(toolchain: &str, features: &[&str]) -> Result<()> {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
    let package = Package {
        name: "agent-ebpf",
        root_dir: root,
        no_default_features: true,
        features,
    };
    aya_build::build_ebpf([package], Toolchain::Custom(toolchain)).with_context(|| {
        format!(
            "Cannot build the kernel programs with toolchain {toolchain}; run `cargo xtask setup`"
        )
    })
}

fn toolchain() -> String {
    if let Ok(chosen) = env::var("ROAMCAST_BPF_TOOLCHAIN") {
        return chosen;
    }
    if compiler_works(DEBIAN) {
        return DEBIAN.to_owned();
    }
    if !compiler_works(NIGHTLY) {
        println!(
            "cargo::warning=Neither {DEBIAN} nor {NIGHTLY} is a usable toolchain for the kernel \
             programs; run `cargo xtask setup` or set ROAMCAST_BPF_TOOLCHAIN"
        );
    }
    NIGHTLY.to_owned()
}

fn compiler_works(toolchain: &str) -> bool {
    Command::new("rustup")
        .args(["run", toolchain, "rustc", "--version"])
        .output()
        .is_ok_and(|output| output.status.success())
}
