//! A VM host (VMS): private directories, a bridge with an uplink, and libvirtd.
//!
//! One process per host, [`node::run`] in `lab-node`, creates the host's mount and UTS namespaces
//! and then acts as init: it starts libvirtd, restarts a dead libvirtd and reaps libvirtd's
//! orphans. The host's `/run`, `/etc/libvirt` and `/var/{lib,cache,log}/libvirt` are directories
//! below the lab's directory, so they can also be reached from outside.

pub(crate) mod capabilities;
pub mod node;

use std::fs;
use std::net::{SocketAddrV6, TcpStream};
use std::ops::Deref;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::Host;
use crate::{registry, wait};

/// Port of libvirtd's unencrypted remote protocol.
pub const LIBVIRT_PORT: u16 = 16509;

/// Longest time until libvirtd answers.
const LIBVIRTD_START: Duration = Duration::from_secs(30);

/// A VM host of the lab.
#[derive(Debug, Clone)]
pub struct Vms {
    host: Host,
}

impl Deref for Vms {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

impl Vms {
    pub(crate) fn new(host: Host) -> Self {
        Self { host }
    }

    /// Returns the URI by which other hosts reach this host's libvirtd.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("qemu+tcp://[{}]/system", self.address())
    }

    /// Returns the outside path of this host's `/var/log/libvirt`.
    #[must_use]
    pub fn libvirt_log_directory(&self) -> PathBuf {
        self.directory().join("log")
    }

    /// Returns the outside path of the directory in which this host's QEMU looks for the
    /// certificates of the memory copy. The directory is empty at first.
    #[must_use]
    pub fn qemu_pki_directory(&self) -> PathBuf {
        self.directory().join(node::QEMU_PKI)
    }

    /// Returns a `virsh` command on this host's own libvirtd.
    #[must_use]
    pub fn virsh(&self) -> Command {
        let mut command = self.command("virsh");
        command.args(["--quiet", "--connect", "qemu:///system"]);
        command
    }

    /// Returns the process id of libvirtd, if it runs.
    #[must_use]
    pub fn libvirtd(&self) -> Option<i32> {
        let pid: i32 = fs::read_to_string(self.pid_path())
            .ok()?
            .trim()
            .parse()
            .ok()?;
        Path::new("/proc")
            .join(pid.to_string())
            .exists()
            .then_some(pid)
    }

    /// Returns the process id of a domain's QEMU on this host.
    ///
    /// # Errors
    ///
    /// When no QEMU of the domain runs here.
    pub fn qemu(&self, domain: &str) -> Result<Pid> {
        let argument = format!("guest={domain},");
        let found = registry::processes_of(&[self.namespace().to_owned()])
            .into_iter()
            .find(|process| process.command.contains(&argument));
        let found = found.with_context(|| format!("{domain} has no QEMU on {}", self.name()))?;
        Ok(Pid::from_raw(found.pid))
    }

    /// Makes libvirtd look for its hooks again (SIGHUP).
    ///
    /// # Errors
    ///
    /// When libvirtd does not run.
    pub fn reload_libvirtd(&self) -> Result<()> {
        let pid = self
            .libvirtd()
            .with_context(|| format!("libvirtd does not run on {}", self.name()))?;
        kill(Pid::from_raw(pid), Signal::SIGHUP).context("Failed to reload libvirtd")
    }

    /// Kills libvirtd (SIGKILL), as a crash would. The host's init restarts it within a second.
    ///
    /// # Errors
    ///
    /// When libvirtd does not run or does not end.
    pub fn kill_libvirtd(&self) -> Result<()> {
        let pid = self
            .libvirtd()
            .with_context(|| format!("libvirtd does not run on {}", self.name()))?;
        kill(Pid::from_raw(pid), Signal::SIGKILL).context("Failed to kill libvirtd")?;
        wait::until("libvirtd to end", Duration::from_secs(5), || {
            (self.libvirtd() != Some(pid)).then_some(())
        })
    }

    /// Stops libvirtd and keeps it down until [`Vms::start_libvirtd`].
    ///
    /// # Errors
    ///
    /// When libvirtd does not end.
    pub fn stop_libvirtd(&self) -> Result<()> {
        fs::write(self.hold_path(), "").context("Failed to hold libvirtd")?;
        if let Some(pid) = self.libvirtd() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).context("Failed to kill libvirtd")?;
        }
        wait::until("libvirtd to end", Duration::from_secs(5), || {
            self.libvirtd().is_none().then_some(())
        })
    }

    /// Starts libvirtd after [`Vms::stop_libvirtd`] and waits until it answers.
    ///
    /// # Errors
    ///
    /// When libvirtd does not answer in time.
    pub fn start_libvirtd(&self) -> Result<()> {
        let _ = fs::remove_file(self.hold_path());
        self.wait_libvirtd()
    }

    /// Waits until libvirtd answers on its Unix socket and on TCP.
    ///
    /// # Errors
    ///
    /// When libvirtd does not answer in time; the text names libvirtd's log.
    pub fn wait_libvirtd(&self) -> Result<()> {
        let socket = self.run_directory().join("libvirt/libvirt-sock");
        let remote = SocketAddrV6::new(self.address(), LIBVIRT_PORT, 0, 0);
        let what = format!(
            "libvirtd on {} (see {})",
            self.name(),
            self.log_path(node::LOG_LABEL).display()
        );
        wait::until(&what, LIBVIRTD_START, || UnixStream::connect(&socket).ok())?;
        wait::until(&what, LIBVIRTD_START, || {
            self.within(|| TcpStream::connect(remote)).ok()?.ok()
        })?;
        Ok(())
    }

    fn pid_path(&self) -> PathBuf {
        self.directory().join(node::PID_FILE)
    }

    fn hold_path(&self) -> PathBuf {
        self.directory().join(node::HOLD_FILE)
    }
}
