//! The real agent in a namespace with a bridge: without libvirt, which it goes on looking for.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test files, each of which uses a part"
)]
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::fs;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lab::binaries;
use roamcast::pki::{self, IssueRequest, Validity};
use serde_json::Value;
use tempfile::TempDir;

use super::netns::wait_for;

/// Its files: certificates, configuration, socket.
pub(crate) struct Files {
    directory: TempDir,
}

impl Files {
    /// Those of agent `vms1` on bridge `br0`, which pins below `bpffs`; `more` is added to the
    /// configuration.
    pub(crate) fn new(bpffs: &Path, more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        pki::init(path, "test CA", Validity::days(1)).unwrap();
        let request = IssueRequest {
            name: "vms1".to_owned(),
            addresses: vec![Ipv6Addr::LOCALHOST.into()],
            validity: Validity::days(1),
        };
        let issued = pki::issue(path, &request).unwrap();
        let text = format!(
            r#"[agent]
name = "vms1"
bridge = "br0"
pin_root = "{pins}"
control_socket = "{socket}"
[tls]
ca = "{ca}"
cert = "{certificate}"
key = "{key}"
[libvirt]
uri = "qemu:///system?socket={path}/no-libvirtd"
{more}"#,
            pins = bpffs.join("roamcast").display(),
            socket = path.join("agent.sock").display(),
            ca = issued.ca.display(),
            certificate = issued.certificate.display(),
            key = issued.key.display(),
            path = path.display(),
        );
        fs::write(path.join("agent.toml"), text).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `roamcast agent`, to be started in the namespaces of the calling thread.
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(binaries::path("roamcast").unwrap());
        command
            .arg("agent")
            .arg("--config")
            .arg(self.path("agent.toml"));
        command
    }

    /// What the agent says about itself, if it answers.
    pub(crate) fn status(&self) -> Option<Value> {
        serde_json::from_str(&self.ask(&["status", "--json"])).ok()
    }

    /// The same, as a person sees it.
    pub(crate) fn table(&self) -> String {
        self.ask(&["status"])
    }

    fn ask(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(binaries::path("roamcast").unwrap());
        command.args(arguments).arg("--socket");
        let output = command.arg(self.path("agent.sock")).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// A running agent, killed on drop.
pub(crate) struct Agent {
    pub(crate) child: Child,
}

impl Agent {
    /// Starts it as `command` says, and waits until it answers. What it logs goes nowhere, unless
    /// `command` has it go elsewhere.
    pub(crate) fn start(files: &Files, stderr: Stdio) -> Self {
        let child = files.command().stderr(stderr).spawn().unwrap();
        let agent = Self { child };
        wait_for("the agent", || files.status());
        agent
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
