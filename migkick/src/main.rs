//! `migkick` runs in a virtual machine and asks Roamcast to migrate the machine to another host.
//!
//! Exit codes: 0 success, 1 failure with one sentence of explanation, 2 wrong usage.

use std::process::ExitCode;

fn main() -> ExitCode {
    migkick::cli::run()
}
