//! The agents of both VM hosts: their certificates, configurations and processes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::relays;
use crate::guest::domain::SOCKET_DIRECTORY;
use crate::host::Host;
use crate::node::Process;
use crate::vms::Vms;
use crate::{Lab, binaries, wait};

/// Longest time until an agent answers and is connected to libvirt.
const START: Duration = Duration::from_secs(20);

/// Options of the agents in addition to the lab's own settings.
#[derive(Clone, Copy, Debug)]
pub struct AgentOptions {
    /// Highest bandwidth of a migration, MiB/s; 0 for no limit. A low bandwidth prolongs the copy.
    pub bandwidth_mib: u64,
    /// Pause that QEMU aims at first, milliseconds, for migrations by agents and by plain libvirt.
    pub downtime_ms: u64,
    /// Parallel connections for the memory; `None`: the agent's default.
    pub parallel_connections: Option<u32>,
    /// Migration flags in addition to the agent's default ones, by libvirt's names.
    pub flags: &'static [&'static str],
    /// Time that a multicast tree may take to grow, milliseconds; `None`: the agent's default.
    pub tree_budget_ms: Option<u64>,
    /// Multicast addresses to which one NIC of a VM may listen; `None`: the agent's default.
    pub listeners: Option<u32>,
    /// MLD Reports per second that one NIC may send; `None`: the agent's default.
    pub reports_per_second: Option<u32>,
    /// Lease of the lab's relays, in seconds; `None`: the relay's default.
    pub relay_lease_s: Option<u64>,
    /// True if the last relay node is a migration control server, through which the agents find
    /// relays.
    pub mcs: bool,
    /// True if the agents run without gates, so that a migration loses and doubles packets.
    pub no_gate: bool,
}

impl AgentOptions {
    /// The agent's defaults, with gates and without a migration control server.
    pub const DEFAULT: Self = Self {
        bandwidth_mib: 0,
        downtime_ms: 50,
        parallel_connections: None,
        flags: &[],
        tree_budget_ms: None,
        listeners: None,
        reports_per_second: None,
        relay_lease_s: None,
        mcs: false,
        no_gate: false,
    };
}

/// Two running agents, named after their VM hosts.
pub struct Agents {
    binary: PathBuf,
    processes: [Option<Process>; 2],
}

impl Agents {
    /// Makes certificates and configurations, and starts both agents.
    ///
    /// # Errors
    ///
    /// When the binary is not built, or an agent does not become ready; the text names its log.
    pub fn start(lab: &Lab, options: AgentOptions) -> Result<Self> {
        let binary = binaries::path("roamcast")?;
        let pki = pki(lab);
        issue_certificates(&binary, &pki, lab, options)?;
        for (vms, peer) in lab.vms().iter().zip(lab.vms().iter().rev()) {
            configure(lab, vms, peer, &pki, options)?;
        }
        let mut agents = Self {
            binary,
            processes: [None, None],
        };
        for index in 0..lab.vms().len() {
            agents.launch(lab, index)?;
        }
        for vms in lab.vms() {
            agents.wait_ready(vms)?;
        }
        Ok(agents)
    }

    /// Kills the agent of a VM host (SIGKILL), as a crash would.
    pub fn kill(&mut self, index: usize) {
        if let Some(mut process) = self.processes.get_mut(index).and_then(Option::take) {
            process.kill();
        }
    }

    /// Starts the agent of a VM host again and waits until it answers.
    ///
    /// # Errors
    ///
    /// When the agent does not become ready.
    pub fn restart(&mut self, lab: &Lab, index: usize) -> Result<()> {
        self.launch(lab, index)?;
        let vms = lab.vms().get(index).context("There are two VM hosts")?;
        self.wait_ready(vms)
    }

    /// Installs libvirt's hook on both VM hosts.
    ///
    /// # Errors
    ///
    /// When the hook cannot be installed, or libvirtd does not run.
    pub fn install_hooks(&self, lab: &Lab) -> Result<()> {
        for vms in lab.vms() {
            vms.output(&mut self.command(vms, &["hook", "install"]))?;
            vms.reload_libvirtd()?;
        }
        Ok(())
    }

    /// Returns a `roamcast` command on a VM host.
    pub fn command(&self, vms: &Vms, arguments: &[&str]) -> Command {
        let mut command = vms.command(&self.binary);
        command.args(arguments);
        command
    }

    /// Returns one of an agent's tables: `status`, `listeners`, `streams` or `migrations`.
    ///
    /// # Errors
    ///
    /// When the agent does not answer, or its answer is not JSON.
    pub fn query(&self, vms: &Vms, table: &str) -> Result<Value> {
        let text = vms.output(&mut self.command(vms, &[table, "--json"]))?;
        serde_json::from_str(&text)
            .with_context(|| format!("roamcast {table} on {} printed no JSON: {text}", vms.name()))
    }

    /// Returns the log of an agent so far.
    pub fn log(&self, vms: &Vms) -> String {
        fs::read_to_string(vms.log_path("agent")).unwrap_or_default()
    }

    fn launch(&mut self, lab: &Lab, index: usize) -> Result<()> {
        let vms = lab.vms().get(index).context("There are two VM hosts")?;
        let config = format!("{SOCKET_DIRECTORY}/agent.toml");
        let command = self.command(vms, &["agent", "--config", &config]);
        let process = vms.spawn("agent", command)?;
        if let Some(slot) = self.processes.get_mut(index) {
            *slot = Some(process);
        }
        Ok(())
    }

    fn wait_ready(&self, vms: &Vms) -> Result<()> {
        let what = format!(
            "the agent on {} (see {})",
            vms.name(),
            vms.log_path("agent").display()
        );
        wait::until(&what, START, || {
            let status = self.query(vms, "status").ok()?;
            (status["hypervisor"]["state"] == "up").then_some(())
        })
        .with_context(|| {
            format!(
                "The agent's last words:\n{}",
                super::last_lines(&self.log(vms), 10)
            )
        })
    }
}

/// Returns the directory with the certificates of all hosts.
pub(super) fn pki(lab: &Lab) -> PathBuf {
    lab.vms1().run_directory().join("pki")
}

fn issue_certificates(binary: &Path, pki: &Path, lab: &Lab, options: AgentOptions) -> Result<()> {
    if pki.exists() {
        fs::remove_dir_all(pki).context("Failed to remove old certificates")?;
    }
    let directory = pki
        .to_str()
        .context("The lab's directory has an odd name")?;
    run(Command::new(binary).args(["pki", "init", directory]))?;
    let (relays, servers) = relays::roles(lab, options);
    let agents = lab.vms().iter().map(|vms| (&**vms, "agent"));
    let hosts = agents
        .chain(relays.iter().map(|relay| (relay, "relay")))
        .chain(servers.iter().map(|server| (server, "mcs")));
    for (host, role) in hosts {
        let address = host.address().to_string();
        let arguments = [
            "pki",
            "issue",
            directory,
            host.name(),
            "--role",
            role,
            "--address",
            &address,
        ];
        run(Command::new(binary).args(arguments))?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("Failed to run {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Installs the certificates of a VM host's QEMU for the copy of memory.
///
/// # Errors
///
/// When a file cannot be copied.
pub fn install_qemu_certificates(lab: &Lab, vms: &Vms) -> Result<()> {
    let from = pki(lab).join(vms.name()).join("qemu");
    let files = fs::read_dir(&from).with_context(|| format!("There is no {}", from.display()))?;
    for file in files {
        let file = file?;
        let to = vms.qemu_pki_directory().join(file.file_name());
        fs::copy(file.path(), &to).with_context(|| format!("Failed to write {}", to.display()))?;
    }
    Ok(())
}

/// Copies a host's certificates into its own directories.
pub(super) fn install_certificates(host: &Host, pki: &Path) -> Result<()> {
    let directory = pki.join(host.name()).join("roamcast");
    for (from, to) in [
        ("cacert.pem", "cacert.pem"),
        ("cert.pem", "cert.pem"),
        ("private/key.pem", "key.pem"),
    ] {
        let from = directory.join(from);
        fs::copy(&from, host.shared_directory().join(to))
            .with_context(|| format!("Failed to copy the certificate {}", from.display()))?;
    }
    Ok(())
}

/// Migration flags of the agent's default configuration.
const DEFAULT_FLAGS: [&str; 4] = [
    "VIR_MIGRATE_LIVE",
    "VIR_MIGRATE_PEER2PEER",
    "VIR_MIGRATE_PERSIST_DEST",
    "VIR_MIGRATE_UNDEFINE_SOURCE",
];

/// Returns the default and the `further` flags as a TOML list; `None` if there are no further
/// flags.
fn flags(further: &[&str]) -> Option<String> {
    let all: Vec<_> = DEFAULT_FLAGS.iter().chain(further).collect();
    (!further.is_empty()).then(|| format!("{all:?}"))
}

/// Writes an agent's configuration and installs its certificates.
fn configure(lab: &Lab, vms: &Vms, peer: &Vms, pki: &Path, options: AgentOptions) -> Result<()> {
    install_certificates(vms, pki)?;
    let (relays, servers) = relays::roles(lab, options);
    let (found_by, hosts) = match servers {
        [] => ("servers", relays),
        servers => ("mcs", servers),
    };
    let relays: Vec<String> = hosts
        .iter()
        .map(|relay| {
            let (name, address) = (relay.name(), relay.address());
            format!("{{ name = \"{name}\", address = \"{address}\" }}")
        })
        .collect();
    let text = format!(
        r#"[agent]
name = "{name}"
bridge = "br0"
uplinks = ["eth0"]

[tls]
ca = "{SOCKET_DIRECTORY}/cacert.pem"
cert = "{SOCKET_DIRECTORY}/cert.pem"
key = "{SOCKET_DIRECTORY}/key.pem"

[[peers]]
name = "{peer_name}"
address = "{peer_address}"
connect_uri = "{connect_uri}"

[policy]
requests_per_minute = 10000
vm_pause_s = 0

[[policy.depart]]
domains = ["*"]
destinations = ["{peer_name}"]
by = ["operator", "vm", "hook"]

[[policy.arrive]]
sources = ["{peer_name}"]
domains = ["*"]

[destination]
{tree_budget}

[mobility]
disputed = "refuse"

[limits]
{limits}

[handover]
enabled = {gate}

[libvirt]
bandwidth_mib = {bandwidth}
{libvirt}

{relay}

[log]
level = "info,roamcast=debug"
"#,
        relay = if relays.is_empty() {
            String::new()
        } else {
            format!("[relay]\n{found_by} = [{}]", relays.join(", "))
        },
        name = vms.name(),
        peer_name = peer.name(),
        peer_address = peer.address(),
        connect_uri = peer.uri(),
        tree_budget = super::key("tree_budget_ms", options.tree_budget_ms),
        limits = [
            super::key("listeners", options.listeners),
            super::key("reports_per_second", options.reports_per_second),
        ]
        .join("\n"),
        gate = !options.no_gate,
        bandwidth = options.bandwidth_mib,
        libvirt = [
            super::key("downtime_ms", Some(options.downtime_ms)),
            super::key("parallel_connections", options.parallel_connections),
            super::key("flags", flags(options.flags)),
        ]
        .join("\n"),
    );
    let path = vms.shared_directory().join("agent.toml");
    fs::write(&path, text).with_context(|| format!("Failed to write {}", path.display()))
}
