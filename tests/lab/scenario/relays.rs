//! The relays and migration control servers of a lab: configuration and processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::agents::{AgentOptions, install_certificates};
use crate::guest::domain::SOCKET_DIRECTORY;
use crate::host::Host;
use crate::node::Process;
use crate::{Lab, binaries, wait};

/// Longest time until a relay's operator socket answers.
const START: Duration = Duration::from_secs(20);

/// The running relays and migration control servers, named after their nodes.
pub struct Relays {
    binary: PathBuf,
    hosts: Vec<Host>,
    /// Number of migration control servers, which are the last nodes of the list.
    servers: usize,
    processes: Vec<Option<Process>>,
}

impl Relays {
    /// Configures and starts a relay or a migration control server on each relay node. `pki` is the
    /// directory with their certificates.
    ///
    /// # Errors
    ///
    /// When the binary is not built, or a relay does not become ready; the text names its log.
    pub fn start(lab: &Lab, pki: &Path, options: AgentOptions) -> Result<Self> {
        let (relays, servers) = roles(lab, options);
        let mut started = Self {
            binary: binaries::path("roamcast")?,
            hosts: lab.relays().to_vec(),
            servers: servers.len(),
            processes: lab.relays().iter().map(|_| None).collect(),
        };
        for server in servers {
            configure_mcs(server, pki)?;
        }
        for relay in relays {
            configure(relay, servers, pki, options.relay_lease_s)?;
        }
        for index in 0..started.hosts.len() {
            started.restart(index)?;
        }
        Ok(started)
    }

    /// Kills the relay on a node (SIGKILL), as a crash would.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut process) = self.processes.get_mut(index).and_then(Option::take) {
            process.kill();
        }
    }

    /// Starts the relay on a node, for the first time or after [`Relays::kill`], and waits until it
    /// answers.
    ///
    /// # Errors
    ///
    /// When the relay does not become ready.
    pub fn restart(&mut self, index: usize) -> Result<()> {
        let host = self.host(index)?;
        let role = self.role(index);
        let config = format!("{SOCKET_DIRECTORY}/{role}.toml");
        let process = host.spawn(role, self.command(host, &[role, "--config", &config]))?;
        if let Some(slot) = self.processes.get_mut(index) {
            *slot = Some(process);
        }
        let host = self.host(index)?;
        let log = host.log_path(self.role(index));
        let what = format!(
            "the {} on {} (see {})",
            self.role(index),
            host.name(),
            log.display()
        );
        wait::until(&what, START, || self.status(index).ok())
            .with_context(|| {
                let said = fs::read_to_string(&log).unwrap_or_default();
                format!("The relay's last words:\n{}", super::last_lines(&said, 10))
            })
            .map(drop)
    }

    /// Returns the output of `roamcast status --json` on a node.
    ///
    /// # Errors
    ///
    /// When the relay does not answer, or its answer is not JSON.
    pub fn status(&self, index: usize) -> Result<Value> {
        let host = self.host(index)?;
        let role = self.role(index);
        let socket = format!("/run/roamcast-{role}/{role}.sock");
        let text =
            host.output(&mut self.command(host, &["status", "--json", "--socket", &socket]))?;
        serde_json::from_str(&text)
            .with_context(|| format!("roamcast status on {} printed no JSON: {text}", host.name()))
    }

    /// Returns the log of the relay on a node so far.
    pub fn log(&self, index: usize) -> String {
        let role = self.role(index);
        let log = self.host(index).map(|host| host.log_path(role));
        log.ok()
            .and_then(|log| fs::read_to_string(log).ok())
            .unwrap_or_default()
    }

    fn role(&self, index: usize) -> &'static str {
        if index + self.servers < self.hosts.len() {
            "relay"
        } else {
            "mcs"
        }
    }

    fn host(&self, index: usize) -> Result<&Host> {
        self.hosts
            .get(index)
            .with_context(|| format!("The lab has no relay {}", index + 1))
    }

    fn command(&self, host: &Host, arguments: &[&str]) -> Command {
        let mut command = host.command(&self.binary);
        command.args(arguments);
        command
    }
}

/// Splits the relay nodes into relays and migration control servers, in this order.
pub(super) fn roles(lab: &Lab, options: AgentOptions) -> (&[Host], &[Host]) {
    let hosts = lab.relays();
    hosts.split_at(hosts.len().saturating_sub(usize::from(options.mcs)))
}

fn configure_mcs(host: &Host, pki: &Path) -> Result<()> {
    install_certificates(host, pki)?;
    let text = format!(
        r#"[mcs]
name = "{name}"
lease_s = 6

[policy]
agents = ["vms?"]
relays = ["relay?"]

[tls]
ca = "{SOCKET_DIRECTORY}/cacert.pem"
cert = "{SOCKET_DIRECTORY}/cert.pem"
key = "{SOCKET_DIRECTORY}/key.pem"
"#,
        name = host.name(),
    );
    let path = host.shared_directory().join("mcs.toml");
    fs::write(&path, text).with_context(|| format!("Failed to write {}", path.display()))
}

fn configure(host: &Host, servers: &[Host], pki: &Path, lease_s: Option<u64>) -> Result<()> {
    install_certificates(host, pki)?;
    let text = format!(
        r#"[relay]
name = "{name}"
interfaces = ["eth0"]
{lease}

[tls]
ca = "{SOCKET_DIRECTORY}/cacert.pem"
cert = "{SOCKET_DIRECTORY}/cert.pem"
key = "{SOCKET_DIRECTORY}/key.pem"

[[policy]]
agents = ["vms?"]
multicast_addresses = ["ff00::/8"]

{mcs}

[log]
level = "info,roamcast=debug"
"#,
        name = host.name(),
        mcs = servers
            .iter()
            .map(|server| {
                let (name, address) = (server.name(), server.address());
                format!("[[mcs]]\nname = \"{name}\"\naddress = \"{address}\"\n")
            })
            .collect::<String>(),
        lease = super::key("lease_s", lease_s),
    );
    let path = host.shared_directory().join("relay.toml");
    fs::write(&path, text).with_context(|| format!("Failed to write {}", path.display()))
}
