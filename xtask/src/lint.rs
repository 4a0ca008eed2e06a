//! `cargo xtask lint`: checks that run no program of the project.
//!
//! | check | by |
//! |---|---|
//! | format, dependencies, lints, documentation | `cargo fmt`, `cargo deny`, `clippy`, `rustdoc` |
//! | builds for one role | `clippy`, `cargo tree` |
//! | who may import whom | [`rooms`] |
//! | retired words | [`words`] |
//! | doc lines that only repeat a name | [`docs`] |
//!
//! The last three checks, the rules of the house, parse each source file once (`syn`). `--house`
//! runs only these checks.

mod docs;
mod rooms;
mod source;
mod words;

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
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
    for (role, foreign) in ROLES {
        one_role(role, foreign)?;
    }
    let mut doc = workspace("doc");
    doc.args(["--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings");
    step("rustdoc", &mut doc)?;
    house()
}

/// The roles of `roamcast`, and the crates that a build for the role must not have.
const ROLES: [(&str, &[&str]); 4] = [
    ("agent", &["redb"]),
    ("relay", &["virt", "redb", "hickory-resolver", "ureq"]),
    ("mcs", &["virt", "aya", "redb", "hickory-resolver", "ureq"]),
    ("ims", &["virt", "aya", "hickory-resolver", "ureq"]),
];

/// Checks a build for one role.
fn one_role(role: &str, foreign: &[&str]) -> Result<()> {
    let build = [
        "-p",
        "roamcast",
        "--no-default-features",
        "--features",
        role,
    ];
    step(
        &format!("clippy of the {role} alone"),
        cargo(["clippy"]).args(build).args(["--", "-D", "warnings"]),
    )?;
    let mut tree = cargo(["tree", "--edges", "normal", "--prefix", "none"]);
    tree.args(["--format", "{p}"]).args(build);
    let output = tree.output().context("Cannot run `cargo tree`")?;
    ensure!(output.status.success(), "`cargo tree` fails for the {role}");
    let tree = String::from_utf8_lossy(&output.stdout);
    let mut crates = tree.lines().filter_map(|line| line.split(' ').next());
    match crates.find(|it| foreign.contains(it)) {
        Some(found) => bail!("A build for the {role} alone has the crate {found}"),
        None => Ok(()),
    }
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
        count => bail!("{count} places break a rule of the house (README, \"Architecture\")"),
    }
}

/// Parses one file of a crate, for the tests of the checks.
#[cfg(test)]
fn parsed(file: &str, text: &str) -> source::Source {
    source::Source::parse(PathBuf::from(file), text.to_owned()).unwrap()
}
