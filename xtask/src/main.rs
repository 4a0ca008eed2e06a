//! Developer verbs: `cargo xtask VERB`.

mod bench;
mod demo;
mod fuzz;
mod host;
mod lab;
mod lint;
mod run;
mod setup;
mod test;

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
    /// Move a real VM under a stream to another subnet, and count what it received
    Demo(demo::DemoArgs),
    /// Run everything that must hold: format, lints, documentation, tests of every level
    Test(test::TestArgs),
    /// Measure: program cost, the relay against other ways, signalling time, moves
    #[command(subcommand)]
    Bench(bench::Verb),
    /// Feed parsers and state machines with made-up bytes, guided by the branches that they take
    Fuzz(fuzz::FuzzArgs),
    /// Check format, lints and documentation
    Lint(lint::LintArgs),
    /// Run a command on a stock Debian kernel, in an emulated machine with KVM
    Host(host::HostArgs),
    /// Build, show or remove the lab: sender, router, two sites with a VM host each
    #[command(subcommand)]
    Lab(lab::Verb),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    match arguments.verb {
        // The only verb whose exit code is that of another program.
        Verb::Host(arguments) => return host::run(arguments),
        Verb::Setup(arguments) => setup::run(&arguments)?,
        Verb::Demo(arguments) => demo::run(&arguments)?,
        Verb::Test(arguments) => test::run(&arguments)?,
        Verb::Bench(verb) => bench::run(&verb)?,
        Verb::Fuzz(arguments) => fuzz::run(&arguments)?,
        Verb::Lint(arguments) => {
            setup::ensure()?;
            lint::lint(&arguments)?;
        }
        Verb::Lab(verb) => lab::run(verb)?,
    }
    Ok(ExitCode::SUCCESS)
}
