//! Cost of the relay: `relay` measures from a sender to the TAPs of a host, `replicate` through a
//! relay.
//!
//! `cargo xtask bench relay|replicate` runs this program and shows the result. The program prints
//! its progress as JSON and writes the result to a file.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use serde::Serialize;
use support::bench_relay::{self, Options};

/// Measured part of the path.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// From a sender to the TAPs of a host.
    Relay,
    /// Through a relay to its subscribers.
    Replicate,
}

#[derive(Debug, Parser)]
struct Arguments {
    what: What,
    /// Number of rounds; each round measures all paths.
    #[arg(long)]
    rounds: Option<usize>,
    /// Counts of TAPs or of subscribers.
    #[arg(long, value_delimiter = ',')]
    counts: Vec<usize>,
    /// UDP payloads, bytes.
    #[arg(long, value_delimiter = ',')]
    payloads: Vec<usize>,
    /// Measure only enough to see that everything works.
    #[arg(long)]
    quick: bool,
    /// File for the result.
    #[arg(long)]
    report: PathBuf,
    /// Argument that cargo passes; ignored.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut options = if arguments.quick {
        Options::quick()
    } else {
        Options::default()
    };
    if let Some(rounds) = arguments.rounds {
        options.rounds = rounds;
    }
    if !arguments.counts.is_empty() {
        options.taps.clone_from(&arguments.counts);
        options.subscribers.clone_from(&arguments.counts);
    }
    if !arguments.payloads.is_empty() {
        options.payloads.clone_from(&arguments.payloads);
    }
    match arguments.what {
        What::Relay => write(&arguments, &bench_relay::relay(&options)?),
        What::Replicate => write(&arguments, &bench_relay::replicate(&options)?),
    }
}

fn write(arguments: &Arguments, report: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(report)? + "\n";
    let path = &arguments.report;
    std::fs::write(path, text).with_context(|| format!("Failed to write {}", path.display()))
}
