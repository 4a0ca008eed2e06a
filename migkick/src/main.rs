//! `migkick`: run inside a virtual machine, asks Roamcast to move that machine to another host.
//!
//! Exit codes: 0 done, 1 failed (one sentence says why), 2 wrong usage.

use std::process::ExitCode;

fn main() -> ExitCode {
    migkick::cli::run()
}
