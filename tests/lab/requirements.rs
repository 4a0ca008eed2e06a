//! What the lab needs of the machine: root and programs.

use std::process::{Command, Stdio};

use nix::unistd::Uid;

/// Programs that the lab runs, and the Debian package of each.
const PROGRAMS: [(&str, &str); 4] = [
    ("ip", "iproute2"),
    ("nsenter", "util-linux"),
    ("libvirtd", "libvirt-daemon-system"),
    ("qemu-system-x86_64", "qemu-system-x86"),
];

/// Returns the reason why the lab can't be built here; `None` if it can.
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

/// Returns true if the lab can be built, and prints the reason otherwise. Tests call this at their
/// start.
///
/// # Panics
///
/// If the lab can't be built and the environment has `CI=true`, because CI must be able to build
/// the lab.
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
