//! Checks whether KVM really works on this machine.
//!
//! On some nested hosts `/dev/kvm` exists and QEMU's firmware runs, but KVM stops with an internal
//! error while a kernel boots. The check therefore boots the guest's own kernel, which must reach a
//! program of its initramfs.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::image::Image;

/// Longest silence of the kernel. With KVM the kernel boots in a second or two. On an emulated host
/// the boot takes a minute, but the kernel keeps printing, and a kernel that prints is not stuck.
const SILENCE: Duration = Duration::from_secs(40);

/// Time after which KVM counts as unusable, whatever the kernel prints.
const DEADLINE: Duration = Duration::from_secs(300);

/// Text that the guest prints after booting, on a line of its own. The newline matters, because the
/// kernel also prints its command line, which contains the same text.
const BOOTED: &str = "\nuserspace runs";

/// Kernel command line. Serial output is the slowest part on an emulated host, so the kernel prints
/// only a few lines. With no line at all, the check could not see progress.
const COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 loglevel=6 rdinit=/bin/busybox -- echo userspace runs";

/// Text that QEMU prints when KVM fails.
const GAVE_UP: &str = "KVM internal error";

/// File with the result for this boot of the machine.
const CACHE: &str = "/run/roamcast-lab/kvm";

/// Returns true if QEMU can run the guests with KVM. The first call on a machine takes up to a few
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
            // Without the file the next process just probes again.
            let _ = fs::write(CACHE, if usable { "yes\n" } else { "no\n" });
        }
        usable
    })
}

fn probe(image: &Image) -> std::io::Result<bool> {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-machine", "pc,accel=kvm", "-cpu", "host", "-m", "128"])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio", "-append", COMMAND_LINE])
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
    let usable = verdict(&receiver, SILENCE, DEADLINE);
    qemu.kill()?;
    qemu.wait()?;
    Ok(usable)
}

/// Evidence in QEMU's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    /// New output without a result.
    Progress,
    /// A result.
    Verdict(bool),
}

/// Waits for a verdict. Returns false if QEMU ends, prints nothing for `silence`, or still runs after
/// `deadline`, each without a verdict.
fn verdict(signs: &Receiver<Sign>, silence: Duration, deadline: Duration) -> bool {
    let end = Instant::now() + deadline;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match signs.recv_timeout(silence.min(left)) {
            Ok(Sign::Verdict(usable)) => return usable,
            Ok(Sign::Progress) if !left.is_zero() => {}
            Ok(Sign::Progress) | Err(_) => return false,
        }
    }
}

/// Reports progress for all output, and the verdict `usable` when `text` appears.
fn report(
    mut output: impl Read + Send + 'static,
    text: &'static str,
    usable: bool,
    sender: Sender<Sign>,
) {
    thread::spawn(move || {
        let mut seen = Vec::new();
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = output.read(&mut chunk) {
            seen.extend_from_slice(chunk.get(..length).unwrap_or_default());
            let sign = if String::from_utf8_lossy(&seen).contains(text) {
                Sign::Verdict(usable)
            } else {
                Sign::Progress
            };
            if sender.send(sign).is_err() || sign != Sign::Progress {
                return;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn signs(signs: &[Sign]) -> (Sender<Sign>, Receiver<Sign>) {
        let (sender, receiver) = mpsc::channel();
        for sign in signs {
            sender.send(*sign).unwrap();
        }
        (sender, receiver)
    }

    #[test]
    fn what_decides_ends_the_probe() {
        for usable in [true, false] {
            let (_sender, receiver) = signs(&[Sign::Progress, Sign::Verdict(usable)]);
            assert_eq!(verdict(&receiver, LONG, LONG), usable);
        }
    }

    #[test]
    fn a_qemu_that_has_ended_or_is_silent_is_of_no_use() {
        let (sender, receiver) = signs(&[Sign::Progress]);
        drop(sender);
        assert!(!verdict(&receiver, LONG, LONG));
        let (_sender, receiver) = signs(&[Sign::Progress]);
        assert!(!verdict(&receiver, Duration::from_millis(1), LONG));
    }

    #[test]
    fn progress_goes_on_for_its_time_only() {
        let (sender, receiver) = signs(&[]);
        let talker = thread::spawn(move || while sender.send(Sign::Progress).is_ok() {});
        assert!(!verdict(&receiver, LONG, Duration::from_millis(20)));
        drop(receiver);
        talker.join().unwrap();
    }
}
