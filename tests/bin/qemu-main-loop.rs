//! A main loop like that of QEMU, without a VM. Started by the test `vhost`, not by hand.

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
