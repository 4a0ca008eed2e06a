//! A main loop like QEMU's, without a VM. The test `vhost` and the bench `rates` start this
//! program; it is not for use by hand.

use std::process::ExitCode;

fn main() -> ExitCode {
    match lab::main_loop::run(std::env::args().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}
