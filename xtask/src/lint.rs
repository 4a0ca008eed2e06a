//! `cargo xtask lint`: checks that run no program of the project.
//!
//! | check | by |
//! |---|---|
//! | format, dependencies, lints, documentation | `cargo fmt`, `cargo deny`, `clippy`, `rustdoc` |
//! | who may import whom | [`rooms`] |
//! | retired words | [`words`] |
//! | doc lines that only repeat a name | [`docs`] |
//!
//! The last three parse each source file once (`syn`). Only `--house` runs them: the tree does not keep
//! their rules everywhere yet.

mod docs;
mod rooms;
mod source;
mod words;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;

use crate::run::{cargo, root, step, workspace};

/// A place in the sources that breaks a rule of the house.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    /// Path from the root of the tree.
    file: PathBuf,
    /// Line number, from 1.
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
/// A check has findings.
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
    // A separate run: features of the workspace must not reach the kernel programs.
    step(
        "clippy of the kernel programs",
        cargo(["clippy", "-p", "agent-ebpf"]).args(["--", "-D", "warnings"]),
    )?;
    let mut doc = workspace("doc");
    doc.args(["--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings");
    step("rustdoc", &mut doc)
}

/// Checks the rules of the house.
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
