//! Developer verbs: `cargo xtask VERB`.

mod lab;
mod setup;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, version)]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Install what building and running needs (Debian 12 with rustup); every verb does it first
    Setup(setup::Arguments),
    /// Build, show or remove the lab: sender, router, two sites with a VM host each
    #[command(subcommand)]
    Lab(lab::Verb),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<()> {
    match arguments.verb {
        Verb::Setup(arguments) => setup::run(&arguments),
        Verb::Lab(verb) => lab::run(verb),
    }
}
