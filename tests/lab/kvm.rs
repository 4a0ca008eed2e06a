//! Does KVM really work here?
//!
//! `/dev/kvm` may exist, QEMU's firmware run, and KVM still stop with an internal error in the
//! middle of a kernel, as on some nested hosts. So the guest itself is started, and its kernel
//! must get as far as running `/init`.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::guest::image::Image;

/// The kernel needs a second or two with KVM.
const DEADLINE: Duration = Duration::from_secs(20);

/// What a Linux kernel says after having booted.
const BOOTED: &str = "Run /init as init process";

/// What QEMU says when KVM gives up.
const GAVE_UP: &str = "KVM internal error";

/// Keeps the answer for this boot of the machine.
const CACHE: &str = "/run/roamcast-lab/kvm";

/// Returns true if QEMU can run the guests by KVM. The first call on a machine takes up to a few
/// seconds.
#[must_use]
pub fn usable(image: &Image) -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        if !Path::new("/dev/kvm").exists() {
            return false;
        }
        if let Ok(cached) = fs::read_to_string(CACHE) {
            return cached.trim() == "yes";
        }
        let usable = probe(image).unwrap_or(false);
        if fs::create_dir_all("/run/roamcast-lab").is_ok() {
            // Without the cache the next process probes again, nothing worse.
            let _ = fs::write(CACHE, if usable { "yes\n" } else { "no\n" });
        }
        usable
    })
}

fn probe(image: &Image) -> std::io::Result<bool> {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-machine", "pc,accel=kvm", "-cpu", "host", "-m", "128"])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-append", "console=ttyS0 panic=-1"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (sender, receiver) = mpsc::channel();
    if let Some(serial) = qemu.stdout.take() {
        report(serial, BOOTED, true, sender.clone());
    }
    if let Some(errors) = qemu.stderr.take() {
        report(errors, GAVE_UP, false, sender);
    }
    let usable = receiver.recv_timeout(DEADLINE).unwrap_or(false);
    qemu.kill()?;
    qemu.wait()?;
    Ok(usable)
}

/// Sends `verdict` once `text` was read from `output`.
fn report(
    mut output: impl Read + Send + 'static,
    text: &'static str,
    verdict: bool,
    sender: mpsc::Sender<bool>,
) {
    thread::spawn(move || {
        let mut seen = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = output.read(&mut chunk) {
            seen.extend_from_slice(chunk.get(..length).unwrap_or_default());
            if String::from_utf8_lossy(&seen).contains(text) {
                let _ = sender.send(verdict);
                return;
            }
        }
    });
}
