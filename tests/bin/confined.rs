//! Runs a program under the restrictions of a systemd unit. The test `units` starts this program;
//! it is not for use by hand.

use std::process::ExitCode;

fn main() -> ExitCode {
    match lab::confine::run(std::env::args_os()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("confined: {error:#}");
            ExitCode::FAILURE
        }
    }
}
