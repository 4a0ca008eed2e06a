//! `cargo xtask lint`: what holds without running anything.
//!
//! | check | by |
//! |---|---|
//! | format, dependencies, lints, documentation | `cargo fmt`, `cargo deny`, `clippy`, `rustdoc` |
//! | who may import whom | [`rooms`] |
//! | words that the project does not use any more | [`words`] |
//! | doc lines that only repeat a name | [`docs`] |
//!
//! The last three, the rules of the house, read the sources (`syn`), each file once. `--house` runs them
//! alone, and nothing else does yet: the tree does not keep them everywhere.

mod docs;
mod rooms;
mod source;
mod words;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use crate::run::{cargo, root, step, workspace};

/// A place in the sources where a rule of the house is broken.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    /// From the root of the tree.
    file: PathBuf,
    /// From 1.
    line: usize,
    message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.message)
    }
}

/// Arguments of `cargo xtask lint`.
#[derive(Debug, Args)]
pub(crate) struct LintArgs {
    /// Check the rules of the house only
    #[arg(long)]
    house: bool,
}

/// `cargo xtask lint`.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn lint(args: &LintArgs) -> Result<()> {
    if args.house { house() } else { run() }
}

/// Runs every check, the quickest first.
///
/// # Errors
///
/// When one of them finds something.
pub(crate) fn run() -> Result<()> {
    step("format", &mut cargo(["fmt", "--all", "--check"]))?;
    let fuzz = ["--manifest-path", "tests/fuzz/Cargo.toml"];
    step(
        "format of the fuzz programs",
        cargo(["fmt", "--check"]).args(fuzz),
    )?;
    step(
        "dependencies",
        &mut cargo(["deny", "check", "licenses", "bans", "sources"]),
    )?;
    step(
        "clippy",
        workspace("clippy").args(["--all-targets", "--", "-D", "warnings"]),
    )?;
    // Apart from the rest: features of the workspace must not reach the kernel programs.
    step(
        "clippy of the kernel programs",
        cargo(["clippy", "-p", "agent-ebpf"]).args(["--", "-D", "warnings"]),
    )?;
    let mut doc = workspace("doc");
    doc.args(["--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings");
    step("rustdoc", &mut doc)
}

/// The rules of the house.
fn house() -> Result<()> {
    eprintln!("==> rooms, words, doc lines");
    let mut findings = Vec::new();
    for source in source::all(&root())? {
        findings.extend(rooms::check(&source));
        findings.extend(words::check(&source));
        findings.extend(docs::check(&source));
    }
    findings.sort();
    for finding in &findings {
        eprintln!("{finding}");
    }
    match findings.len() {
        0 => Ok(()),
        count => bail!("{count} places break a rule of the house (README, \"The source tree\")"),
    }
}

/// Parses one file of a crate, for the tests of the checks.
#[cfg(test)]
fn parsed(file: &str, text: &str) -> source::Source {
    source::Source::parse(PathBuf::from(file), text.to_owned()).unwrap()
}
