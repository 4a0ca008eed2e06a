//! What the relay costs: `relay` from a sender to the TAPs of a host, `replicate` through a relay.
//!
//! `cargo xtask bench relay|replicate` runs it and shows the result; this program prints what it is
//! at, as JSON, and writes the result to a file.

#[path = "bench_relay/mod.rs"]
mod bench_relay;
#[path = "support/netns.rs"]
mod netns;
#[path = "support/tap.rs"]
mod tap;

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use bench_relay::Options;
use clap::{Parser, ValueEnum};
use serde::Serialize;

/// What to measure.
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
    /// Rounds, each of all ways.
    #[arg(long)]
    rounds: Option<usize>,
    /// Numbers of TAPs or of subscribers.
    #[arg(long, value_delimiter = ',')]
    counts: Vec<usize>,
    /// UDP payloads, bytes.
    #[arg(long, value_delimiter = ',')]
    payloads: Vec<usize>,
    /// Just enough to see that everything works.
    #[arg(long)]
    quick: bool,
    /// File for the result.
    #[arg(long)]
    report: PathBuf,
    /// Given by cargo.
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
