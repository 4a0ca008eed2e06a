//! The init process of a host: creates the host's namespaces and, on a VMS, supervises libvirtd.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::netns;

/// Label of the log with the output of this process and of libvirtd.
pub(crate) const LOG_LABEL: &str = "libvirtd";
/// File with libvirtd's process id. This path and the next ones are relative to the VMS's directory
/// outside, and to the root on the VMS itself.
pub(super) const PID_FILE: &str = "run/lab-node/libvirtd.pid";
/// While this file exists, the host does not start libvirtd.
pub(super) const HOLD_FILE: &str = "run/lab-node/libvirtd.hold";
/// File with the id of this process, written when the namespaces are complete.
pub(crate) const READY_FILE: &str = "run/lab-node/ready";

/// Pause before the restart of a dead libvirtd: long enough for a client to notice, and well within
/// the second after which systemd would restart it.
const RESTART_DELAY: Duration = Duration::from_millis(500);
/// Interval of the checks for ended children and for [`HOLD_FILE`].
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Settings of a host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    /// Host name in the UTS namespace.
    pub hostname: String,
    /// Path of the network namespace's handle.
    pub namespace: PathBuf,
    /// Outside directory with the host's private directories.
    pub directory: PathBuf,
    /// UUID by which libvirt identifies this host; two hosts with the same UUID refuse to migrate.
    pub host_uuid: String,
    /// Text of `/etc/hosts`. Without the names of both hosts each libvirt connection waits for
    /// a resolver that does not exist, about 11 s.
    pub hosts: String,
    /// True if the host starts libvirtd at once. Otherwise `HOLD_FILE` exists from the start.
    pub libvirtd: bool,
}

/// Becomes a host. Returns only on error.
///
/// # Errors
///
/// When the process cannot make a namespace, a mount or libvirtd's configuration.
pub fn run(settings: &Settings) -> Result<()> {
    let namespace = fs::File::open(&settings.namespace)
        .with_context(|| format!("Failed to open {}", settings.namespace.display()))?;
    setns(namespace, CloneFlags::CLONE_NEWNET).context("Failed to enter the network namespace")?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)
        .context("Failed to make mount and UTS namespaces")?;
    netns::sysctl("kernel/hostname", &settings.hostname)?;
    // A QEMU outlives the libvirtd that started it, so this process has to reap it.
    prctl::set_child_subreaper(true).context("Failed to become the reaper of orphans")?;
    write_configuration(settings)?;
    mount_private(&settings.directory)?;
    if !settings.libvirtd {
        fs::write(inside(HOLD_FILE), "").context("Failed to hold libvirtd")?;
    }
    // A rename puts the file into place, so that a reader never finds an empty file.
    let new = inside("run/lab-node/ready.new");
    fs::write(&new, std::process::id().to_string())
        .and_then(|()| fs::rename(&new, inside(READY_FILE)))
        .context("Failed to say that the host is ready")?;
    supervise()
}

/// Returns the path on the VMS itself of a file that is relative to the VMS's directory.
fn inside(file: &str) -> PathBuf {
    Path::new("/").join(file)
}

/// The host's private directories: the name below the VMS's directory, and the mount point.
const PRIVATE: [(&str, &str); 5] = [
    ("etc", "/etc/libvirt"),
    ("lib", "/var/lib/libvirt"),
    ("cache", "/var/cache/libvirt"),
    ("log", "/var/log/libvirt"),
    ("run", "/run"),
];

fn mount_private(directory: &Path) -> Result<()> {
    mount(
        None::<&str>,
        "/",
        None::<&str>,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        None::<&str>,
    )
    .context("Failed to make the mounts private")?;
    // A sysfs mounted here shows the interfaces of this network namespace.
    mount(
        Some("sysfs"),
        "/sys",
        Some("sysfs"),
        MsFlags::empty(),
        None::<&str>,
    )
    .context("Failed to mount /sys")?;
    mount(
        Some("bpf"),
        "/sys/fs/bpf",
        Some("bpf"),
        MsFlags::empty(),
        Some("mode=0700"),
    )
    .context("Failed to mount /sys/fs/bpf")?;
    bind(&directory.join("hosts"), Path::new("/etc/hosts"))?;
    // `/run` comes last, because its mount may hide `directory`, which holds the others.
    for (name, target) in PRIVATE {
        bind(&directory.join(name), Path::new(target))?;
    }
    Ok(())
}

fn bind(source: &Path, target: &Path) -> Result<()> {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .with_context(|| {
        format!(
            "Failed to mount {} on {}",
            source.display(),
            target.display()
        )
    })
}

fn write_configuration(settings: &Settings) -> Result<()> {
    let directory = &settings.directory;
    for (name, target) in PRIVATE {
        fs::create_dir_all(directory.join(name))
            .with_context(|| format!("Failed to create {name} in {}", directory.display()))?;
        fs::create_dir_all(target).with_context(|| format!("Failed to create {target}"))?;
    }
    for name in ["run/roamcast-lab", "run/lab-node", "run/lock", QEMU_PKI] {
        fs::create_dir_all(directory.join(name))
            .with_context(|| format!("Failed to create {name} in {}", directory.display()))?;
    }
    for (name, text) in [
        ("hosts", settings.hosts.clone()),
        ("etc/libvirtd.conf", libvirtd_conf(&settings.host_uuid)),
        ("etc/qemu.conf", QEMU_CONF.to_owned()),
    ] {
        let path = directory.join(name);
        fs::write(&path, text).with_context(|| format!("Failed to write {}", path.display()))?;
    }
    Ok(())
}

fn libvirtd_conf(host_uuid: &str) -> String {
    format!(
        r#"listen_tls = 0
listen_tcp = 1
listen_addr = "::"
auth_tcp = "none"
auth_unix_ro = "none"
auth_unix_rw = "none"
host_uuid = "{host_uuid}"
log_outputs = "3:stderr"
"#
    )
}

const QEMU_CONF: &str = r#"security_driver = "none"
cgroup_controllers = [ ]
namespaces = [ ]
user = "root"
group = "root"
migration_address = "::"
stdio_handler = "file"
migrate_tls_x509_cert_dir = "/etc/libvirt/pki"
"#;

/// Outside path of `migrate_tls_x509_cert_dir`, relative to the host's directory.
pub(super) const QEMU_PKI: &str = "etc/pki";

/// Keeps libvirtd running and reaps orphans. Returns only on error.
fn supervise() -> Result<()> {
    let mut libvirtd: Option<Child> = None;
    loop {
        while let Ok(status) = waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                break;
            }
            let ended = libvirtd
                .as_ref()
                .and_then(|child| i32::try_from(child.id()).ok());
            if ended.is_some() && status.pid().map(Pid::as_raw) == ended {
                eprintln!("libvirtd ended: {}", describe(status));
                libvirtd = None;
                let _ = fs::remove_file(inside(PID_FILE));
                thread::sleep(RESTART_DELAY);
            }
        }
        if libvirtd.is_none() && !inside(HOLD_FILE).exists() {
            let child = Command::new("libvirtd")
                .arg("--listen")
                .stdin(Stdio::null())
                .spawn()
                .context("Failed to start libvirtd: run `cargo xtask setup`")?;
            fs::write(inside(PID_FILE), child.id().to_string())
                .context("Failed to write libvirtd's process id")?;
            libvirtd = Some(child);
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn describe(status: WaitStatus) -> String {
    match status {
        WaitStatus::Exited(_, code) => format!("{}", ExitStatus::from_raw(code << 8)),
        WaitStatus::Signaled(_, signal, _) => format!("{signal}"),
        other => format!("{other:?}"),
    }
}
