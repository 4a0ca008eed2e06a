//! Installs Debian packages.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::unistd::Uid;

use super::Step;

/// Suite with libvirt 11 and QEMU 10. The versions of the stable suite do not reliably migrate to
/// each other over IPv6, and `qemu-utils` of this suite conflicts with them.
const BACKPORTS: &str = "bookworm-backports";

/// Packages of the stable and security suites, with their purpose.
const STABLE: [(&str, &str); 20] = [
    ("rustc-web", "compiler with the BPF target"),
    ("libstd-rust-web-dev-bpf", "`core` for the BPF target"),
    ("rust-web-llvm", "LLVM of that compiler"),
    ("llvm-22-dev", "to build bpf-linker"),
    ("bpftool", "looking at maps"),
    ("busybox-static", "userland of the guest image"),
    ("cpio", "packing the guest image"),
    ("xz-utils", "unpacking the guest's kernel modules"),
    (
        "kmod",
        "indexing and loading the host machine's kernel modules",
    ),
    ("ethtool", "switching offloads in tests"),
    ("tcpdump", "captures in tests"),
    ("systemd", "what its units mean, in tests"),
    ("nftables", "what the relay is compared with in its bench"),
    ("socat", "likewise"),
    ("ffmpeg", "a real stream in the demo"),
    ("iproute2", "namespaces, links, bridges"),
    ("build-essential", "linking, and building libFuzzer"),
    ("pkg-config", "finding libvirt"),
    ("libz-dev", "to build bpf-linker"),
    ("libzstd-dev", "to build bpf-linker"),
];

/// Packages of the backports suite.
const BACKPORTED: [(&str, &str); 5] = [
    ("qemu-system-x86", "guests"),
    ("libvirt-daemon-system", "VM hosts"),
    ("libvirt-daemon-driver-qemu", "VM hosts"),
    ("libvirt-clients", "virsh"),
    ("libvirt-dev", "to build the agent"),
];

/// Adds the backports suite to apt's sources, unless it is present or not needed.
pub(super) fn source() -> Result<Option<Step>> {
    if !is_bookworm() || missing(&BACKPORTED).is_empty() {
        return Ok(None);
    }
    let sources = sources();
    if sources.iter().any(|text| text.contains(BACKPORTS)) {
        return Ok(None);
    }
    let Some(stanza) = sources.iter().find_map(|text| backports_stanza(text)) else {
        bail!(
            "No apt source of suite bookworm was found to derive {BACKPORTS} from: add it, then \
             run this again"
        );
    };
    let mut command = Command::new("sh");
    // The text comes from the machine's own configuration. It is passed as an argument, not as
    // code.
    command.args(["-c", "printf '%s' \"$1\" > \"$2\"", "sh", &stanza, TARGET]);
    Ok(Some(Step {
        summary: format!("{BACKPORTS} as an apt source: it has libvirt and QEMU"),
        commands: vec![(format!("write {TARGET}"), privileged(command)?)],
    }))
}

const TARGET: &str = "/etc/apt/sources.list.d/roamcast-backports.sources";

/// Installs the packages that are missing.
pub(super) fn packages() -> Result<Option<Step>> {
    let stable = missing(&STABLE);
    let backported = missing(&BACKPORTED);
    if stable.is_empty() && backported.is_empty() {
        return Ok(None);
    }
    let all: Vec<String> = stable
        .iter()
        .chain(&backported)
        .map(|(name, purpose)| format!("  {name}: {purpose}"))
        .collect();
    let list = all.join("\n");
    if !is_bookworm() {
        bail!(
            "This is not Debian 12, so nothing is installed automatically. These packages, by \
             their Debian names, are missing:\n{list}\nInstall them (QEMU 8 and libvirt 9 or \
             newer), then run this again"
        );
    }
    // A broken third-party source must not stop the installation; the installation itself reports
    // packages that it cannot find.
    let mut update = Command::new("sh");
    update.args(["-c", "apt-get --quiet update || true"]);
    let mut commands = vec![("read the package lists".to_owned(), privileged(update)?)];
    for (suite, packages) in [(None, &stable), (Some(BACKPORTS), &backported)] {
        if packages.is_empty() {
            continue;
        }
        let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
        if let Some(suite) = suite {
            arguments.extend(["--target-release", suite]);
        }
        arguments.extend(packages.iter().map(|(name, _)| *name));
        commands.push((
            format!("install {} packages", packages.len()),
            apt(&arguments)?,
        ));
    }
    Ok(Some(Step {
        summary: format!("Debian packages:\n{list}"),
        commands,
    }))
}

/// Returns true on Debian 12.
fn is_bookworm() -> bool {
    fs::read_to_string("/etc/os-release")
        .is_ok_and(|text| text.lines().any(|line| line == "VERSION_CODENAME=bookworm"))
}

/// Returns the texts of all enabled apt sources.
fn sources() -> Vec<String> {
    let directory = fs::read_dir("/etc/apt/sources.list.d")
        .into_iter()
        .flatten()
        .flatten();
    directory
        .map(|entry| entry.path())
        .filter(|path| {
            [Some("list"), Some("sources")].contains(&path.extension().and_then(|e| e.to_str()))
        })
        .chain([Path::new("/etc/apt/sources.list").to_path_buf()])
        .filter_map(|path| fs::read_to_string(path).ok())
        .collect()
}

/// Derives the source of the backports suite from a source of `bookworm`: the same URI and key.
fn backports_stanza(source: &str) -> Option<String> {
    for stanza in source.split("\n\n") {
        let field = |name: &str| {
            stanza
                .lines()
                .find_map(|line| Some(line.strip_prefix(name)?.trim().to_owned()))
        };
        if field("Suites:").is_some_and(|suites| suites.split(' ').any(|it| it == "bookworm")) {
            let uri = field("URIs:")?;
            let key = field("Signed-By:").map(|key| format!("Signed-By: {key}\n"));
            return Some(deb822(&uri, key.as_deref().unwrap_or_default()));
        }
    }
    // The old one-line format: deb [options] URI suite components.
    source.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[') {
            Some(rest) => rest.split_once(']')?,
            None => ("", rest),
        };
        let mut words = rest.split_whitespace();
        let uri = words.next()?;
        (words.next()? == "bookworm").then_some(())?;
        let key = options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by="));
        let key = key
            .map(|key| format!("Signed-By: {key}\n"))
            .unwrap_or_default();
        Some(deb822(uri, &key))
    })
}

fn deb822(uri: &str, key: &str) -> String {
    format!("Types: deb\nURIs: {uri}\nSuites: {BACKPORTS}\nComponents: main\n{key}")
}

/// Returns the packages of a list that are not installed.
fn missing(wanted: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
    let names = wanted.iter().map(|(name, _)| *name);
    let output = Command::new("dpkg-query")
        .args([
            "--show",
            "--showformat",
            "${db:Status-Abbrev} ${Package} ${Provides}\n",
        ])
        .args(names)
        .output();
    let Ok(output) = output else {
        return wanted.to_vec();
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let installed: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("ii"))
        .flat_map(|line| line.split([' ', ',']))
        .collect();
    wanted
        .iter()
        .filter(|(name, _)| !installed.contains(name))
        .copied()
        .filter(|(name, _)| !provided(name))
        .collect()
}

/// Returns true if an installed package provides a virtual package, as `zlib1g-dev` provides
/// `libz-dev`.
fn provided(name: &str) -> bool {
    let real = match name {
        "libz-dev" => "zlib1g-dev",
        _ => return false,
    };
    Command::new("dpkg-query")
        .args(["--show", "--showformat", "${db:Status-Abbrev}", real])
        .output()
        .is_ok_and(|output| output.stdout.starts_with(b"ii"))
}

fn apt(arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new("apt-get");
    command
        .args(["--quiet", "-o", "DPkg::Lock::Timeout=300"])
        .args(arguments);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    privileged(command)
}

/// Runs a command as root: directly, or by `sudo` if that needs no password.
fn privileged(command: Command) -> Result<Command> {
    if Uid::effective().is_root() {
        return Ok(command);
    }
    let allowed = Command::new("sudo")
        .args(["--non-interactive", "true"])
        .output()
        .is_ok_and(|output| output.status.success());
    if !allowed {
        bail!("Installing needs root: run `cargo xtask setup` as root, or allow sudo");
    }
    let mut sudo = Command::new("sudo");
    sudo.arg("--non-interactive").arg("env");
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            let mut pair = key.to_owned();
            pair.push("=");
            pair.push(value);
            sudo.arg(pair);
        }
    }
    sudo.arg(command.get_program()).args(command.get_args());
    Ok(sudo)
}

/// Returns the standard output of a program.
pub(super) fn output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("Failed to run {program}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: &str = "Types: deb\nURIs: http://mirror.example/debian\n\
        Suites: bookworm-backports\nComponents: main\nSigned-By: /usr/share/keyrings/k.gpg\n";

    #[test]
    fn backports_are_derived_from_a_deb822_source() {
        let source = "Types: deb\nURIs: http://security.example/debian\n\
            Suites: bookworm-security\nComponents: main\n\n\
            Types: deb\n# a comment\nURIs: http://mirror.example/debian\n\
            Suites: bookworm bookworm-updates\nComponents: main\n\
            Signed-By: /usr/share/keyrings/k.gpg\n";
        assert_eq!(backports_stanza(source).as_deref(), Some(WANTED));
    }

    #[test]
    fn backports_are_derived_from_a_one_line_source() {
        let source = "# deb http://old.example/debian bookworm main\n\
            deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://mirror.example/debian \
            bookworm main contrib\n";
        assert_eq!(backports_stanza(source).as_deref(), Some(WANTED));
    }

    #[test]
    fn a_source_of_other_suites_gives_no_backports() {
        assert_eq!(
            backports_stanza("deb http://mirror.example/debian bookworm-security main"),
            None
        );
        assert_eq!(backports_stanza(""), None);
    }
}
