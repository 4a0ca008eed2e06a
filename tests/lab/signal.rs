//! Removes the lab when its owner is interrupted.
//!
//! A handler for SIGINT, SIGTERM and SIGHUP writes one byte, the signal's number, to a pipe. A
//! thread reads the byte, removes every lab that this process owns, and exits with the status that
//! a shell expects. A lab under construction stops first: its next step fails, because
//! [`interrupted`] is true from then on.

#![allow(unsafe_code, reason = "installing a signal handler")]

use std::io::Read;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::thread;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::registry;

/// Write end of the pipe, for the handler; -1 before the pipe exists.
static PIPE: AtomicI32 = AtomicI32::new(-1);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static INSTALL: Once = Once::new();
/// Names of the labs that this process must remove.
static OWNED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Registers the lab `name` for removal if this process is interrupted, until [`release`].
pub(crate) fn guard(name: &str) {
    INSTALL.call_once(install);
    OWNED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(name.to_owned());
}

/// Returns true after an interruption of the process: no step may build or wait any more.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Removes a lab from the list of labs to remove, because the lab no longer exists or stays. Does
/// not return after an interruption, because the process is about to exit.
pub(crate) fn release(name: &str) {
    while interrupted() {
        thread::park();
    }
    OWNED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .retain(|owned| owned != name);
}

fn install() {
    // Without a pipe (no descriptors left) the signals keep their default action. The next `lab up`
    // then removes the remains.
    let Ok((mut reader, writer)) = std::io::pipe() else {
        return;
    };
    PIPE.store(writer.into_raw_fd(), Ordering::SeqCst);
    let action = SigAction::new(
        SigHandler::Handler(on_signal),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only calls write(2), which is async-signal-safe.
        let _ = unsafe { sigaction(signal, &action) };
    }
    thread::spawn(move || {
        let mut signal = [0u8; 1];
        if reader.read_exact(&mut signal).is_ok() {
            INTERRUPTED.store(true, Ordering::SeqCst);
            let owned = OWNED.lock().unwrap_or_else(PoisonError::into_inner).clone();
            for name in owned {
                if let Err(error) = registry::down(&name) {
                    eprintln!("Failed to remove lab {name}: {error:#}");
                }
            }
            std::process::exit(128 + i32::from(signal[0]));
        }
    });
}

extern "C" fn on_signal(signal: i32) {
    let fd: RawFd = PIPE.load(Ordering::SeqCst);
    let byte = [u8::try_from(signal).unwrap_or(0)];
    // SAFETY: the call writes one byte of a live array; the descriptor was leaked in `install` and
    // stays open.
    let _ = unsafe { libc::write(fd, byte.as_ptr().cast(), 1) };
}
