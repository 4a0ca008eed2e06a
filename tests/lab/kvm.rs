//! Does KVM really work here?
//!
//! `/dev/kvm` may exist and QEMU's KVM still stop with an internal error at the guest's first
//! instructions, as on some nested hosts. So a machine without a disk is started and its firmware
//! must get as far as looking for one.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// The firmware needs a fraction of a second with KVM.
const DEADLINE: Duration = Duration::from_secs(5);

/// What SeaBIOS says after having run all of itself.
const DONE: &str = "No bootable device";

/// Keeps the answer for this boot of the machine.
const CACHE: &str = "/run/roamcast-lab/kvm";

/// Returns true if QEMU can use KVM. The first call on a machine takes up to a few seconds.
#[must_use]
pub fn usable() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        if !Path::new("/dev/kvm").exists() {
            return false;
        }
        if let Ok(cached) = fs::read_to_string(CACHE) {
            return cached.trim() == "yes";
        }
        let usable = probe().unwrap_or(false);
        if fs::create_dir_all("/run/roamcast-lab").is_ok() {
            // Without the cache the next process probes again, nothing worse.
            let _ = fs::write(CACHE, if usable { "yes\n" } else { "no\n" });
        }
        usable
    })
}

fn probe() -> std::io::Result<bool> {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-machine",
            "pc,accel=kvm",
            "-cpu",
            "host",
            "-m",
            "64",
            "-nodefaults",
        ])
        .args(["-display", "none", "-no-reboot", "-chardev", "stdio,id=log"])
        .args(["-device", "isa-debugcon,iobase=0x402,chardev=log"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let (sender, receiver) = mpsc::channel();
    if let Some(mut log) = qemu.stdout.take() {
        thread::spawn(move || {
            let mut text = Vec::new();
            let mut chunk = [0; 4096];
            while let Ok(length @ 1..) = log.read(&mut chunk) {
                text.extend_from_slice(chunk.get(..length).unwrap_or_default());
                if String::from_utf8_lossy(&text).contains(DONE) {
                    let _ = sender.send(());
                }
            }
        });
    }
    let usable = receiver.recv_timeout(DEADLINE).is_ok();
    qemu.kill()?;
    qemu.wait()?;
    Ok(usable)
}
