//! What the machine must have for the lab.

use std::process::{Command, Stdio};

use nix::unistd::Uid;

/// Programs that the lab runs, and the Debian package of each.
const PROGRAMS: [(&str, &str); 4] = [
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("libvirtd", "libvirt-daemon-system"),
    ("qemu-system-x86_64", "qemu-system-x86"),
];

/// Returns why the lab can't be built here, if so.
#[must_use]
pub fn missing() -> Option<String> {
    if !Uid::effective().is_root() {
        return Some("not root".to_owned());
    }
    PROGRAMS.iter().find_map(|(program, package)| {
        let mut command = Command::new(program);
        let started = command
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        started
            .is_err()
            .then(|| format!("{program} is missing: install {package}"))
    })
}

/// For the start of a test: returns false, having printed why, where the lab can't be built.
///
/// # Panics
///
/// Where the lab can't be built but the environment says `CI=true`: there it must be possible.
#[must_use]
#[allow(
    clippy::panic,
    reason = "only tests call this, and they fail by panicking"
)]
pub fn met() -> bool {
    match missing() {
        None => true,
        Some(reason) if std::env::var("CI").as_deref() == Ok("true") => {
            panic!("The lab is not possible here: {reason}")
        }
        Some(reason) => {
            eprintln!("skipped: {reason}");
            false
        }
    }
}
