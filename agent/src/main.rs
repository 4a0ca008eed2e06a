//! `roamcast`: the agent of a VM host, the other roles, and the operator's commands.

use std::process::ExitCode;

use clap::Parser;
use roamcast::allocator;
use roamcast::cli::Cli;

fn main() -> ExitCode {
    allocator::return_large_blocks();
    Cli::parse().run()
}
