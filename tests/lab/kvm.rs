//! Does KVM really work here?
//!
//! `/dev/kvm` may exist, QEMU's firmware run, and KVM still stop with an internal error in the
//! middle of a kernel, as on some nested hosts. So the guest's own kernel is started, and must get
//! as far as running a program of its initramfs.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::image::Image;

/// The kernel needs a second or two with KVM. On an emulated host it needs a minute, but goes on
/// saying something: as long as it does, it is not stuck.
const SILENCE: Duration = Duration::from_secs(40);

/// Whoever goes on for so long is of no use, whatever it says.
const DEADLINE: Duration = Duration::from_secs(300);

/// What the guest says after having booted: a line of its own, because the kernel repeats its
/// command line, which tells the first process to say so.
const BOOTED: &str = "\nuserspace runs";

/// Serial output costs an emulated host more than all else, so the kernel says only a few lines;
/// quite silent, it would not show that it goes on.
const COMMAND_LINE: &str =
    "console=ttyS0 panic=-1 loglevel=6 rdinit=/bin/busybox -- echo userspace runs";

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

/// What was read from QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sign {
    /// Something new, and no more.
    Progress,
    /// What decides.
    Verdict(bool),
}

/// Waits for what decides, as long as there is progress. A QEMU that has ended decides nothing.
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

/// Sends progress for whatever is read from `output`, and `usable` once that is `text`.
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
