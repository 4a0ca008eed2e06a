//! A program under the restrictions of a systemd unit. Started by the test `units`, not by hand.

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
