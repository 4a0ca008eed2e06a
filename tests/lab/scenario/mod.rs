//! Scenarios of the demo, the VM tests and the benches: a guest receives streams and migrates.
//!
//! ```text
//! Testbed::up -> boot -> senders start -> guest joins and receives
//!     -> migration by migkick, roamcast or virsh -> results
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`agents`] | certificates, configuration and processes of the two agents |
//! | `guests` | guests as libvirt domains |
//! | [`stream`] | parameters of streams, the sender's processes and the guest's joins |
//! | [`mobility`] | the mapping server, the correspondent, and the guest's node |
//! | [`mod@sessions`] | sessions between the correspondent and the guest |
//! | [`relays`] | configuration and processes of the relays |
//! | [`flap`] | native multicast removed from the guest's site and restored |
//! | [`shuttle`] | one guest that migrates back and forth under its streams |
//! | [`crossing`] | two guests that migrate to each other's VM host at the same time |
//! | [`mod@measure`] | one whole run: a [`RunRow`](crate::probe::report::RunRow) and the times of its events |

pub mod agents;
pub mod crossing;
pub mod flap;
mod guests;
pub mod measure;
pub mod mobility;
mod mover;
mod party;
pub mod relays;
pub mod sessions;
pub mod shuttle;
pub mod stream;
mod tally;

use std::net::Ipv6Addr;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guest::control::Control;
use crate::guest::domain::{Accelerator, Bandwidth, DomainConfig, NicDriver};
use crate::guest::image;
use crate::vms::Vms;
use crate::{Lab, LabConfig, Site, kvm};
use agents::{AgentOptions, Agents};
use mobility::{GuestNode, Mobility};
use mover::Mover;
use relays::Relays;
use sessions::Sessions;
use stream::{Placed, StreamKind};

/// Multicast address of the lab's first stream.
pub const STREAM_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xff1e, 0, 0, 0, 0, 0, 0x4000, 0x1);
/// UDP destination port of all streams.
pub const STREAM_PORT: u16 = 5004;

/// A lab with guests and, except in a baseline, an agent on each VM host.
pub struct Testbed {
    /// Channel of the first guest; `None` before its boot. This field is dropped before `lab`,
    /// because the channel's sockets lie in directories of the lab.
    control: Option<Control>,
    node: Option<GuestNode>,
    mobility: Option<Mobility>,
    agents: Option<Agents>,
    /// Limits and flags for migrations by plain libvirt.
    limits: AgentOptions,
    relays: Option<Relays>,
    domain: DomainConfig,
    /// Domains booted beside the first guest; the next [`Testbed::boot`] destroys them.
    further: Vec<DomainConfig>,
    lab: Lab,
}

impl Testbed {
    /// Builds the lab and starts the agents and relays. Without `agents`, the testbed is a baseline
    /// and starts neither.
    ///
    /// # Errors
    ///
    /// When a part cannot be built or a program does not become ready.
    pub fn up(config: LabConfig, memory_mib: u32, agents: Option<AgentOptions>) -> Result<Self> {
        let image = image::ensure(&image::default_directory())?;
        let accelerator = if kvm::usable(&image) {
            Accelerator::Kvm
        } else {
            Accelerator::Tcg
        };
        let domain = DomainConfig {
            memory_mib,
            ..DomainConfig::numbered(1, image, accelerator)
        };
        let lab = Lab::up(config)?;
        let options = agents.unwrap_or(AgentOptions::DEFAULT);
        let agents = agents
            .map(|options| Agents::start(&lab, options))
            .transpose()?;
        let relays = match &agents {
            Some(_) if !lab.relays().is_empty() => {
                Some(Relays::start(&lab, &agents::pki(&lab), options)?)
            }
            _ => None,
        };
        let mobility = lab.config().mobility;
        let mobility = mobility.then(|| Mobility::start(&lab)).transpose()?;
        Ok(Self {
            control: None,
            node: None,
            mobility,
            agents,
            limits: options,
            relays,
            domain,
            further: Vec::new(),
            lab,
        })
    }

    /// Sets the limits and flags of migrations by plain libvirt to those of agents with these
    /// options, instead of [`AgentOptions::DEFAULT`].
    #[must_use]
    pub fn with_limits_of(mut self, options: AgentOptions) -> Self {
        self.limits = options;
        self
    }

    /// Returns the lab, with its nodes.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Returns the name of the first guest's libvirt domain.
    pub fn domain_name(&self) -> &str {
        &self.domain.name
    }

    /// Returns the configuration of the first guest's domain.
    pub fn domain(&self) -> &DomainConfig {
        &self.domain
    }

    /// Limits the NICs of the first guest from its next boot on; `None` removes the limit.
    pub fn limit(&mut self, bandwidth: Option<Bandwidth>) {
        self.domain.bandwidth = bandwidth;
    }

    /// Sets queues and reader of all guests' NICs, from their next boot on.
    pub fn read_nics_by(&mut self, driver: NicDriver) {
        self.domain.driver = driver;
    }

    /// Returns the agents.
    ///
    /// # Errors
    ///
    /// When the testbed is a baseline, which has no agents.
    pub fn agents(&mut self) -> Result<&mut Agents> {
        self.agents
            .as_mut()
            .context("This testbed runs without agents")
    }

    /// Returns the migration records of the agent on the VM host with the index `host`, the newest
    /// last.
    ///
    /// # Errors
    ///
    /// When the testbed is a baseline, or the agent does not answer.
    pub fn records(&self, host: usize) -> Result<Vec<Value>> {
        let vms = &self.lab().vms()[host];
        let migrations = self.running_agents()?.query(vms, "migrations")?;
        Ok(migrations.as_array().cloned().unwrap_or_default())
    }

    /// Returns the newest migration record of the agent on the VM host with the index `host`.
    ///
    /// # Errors
    ///
    /// As for [`Testbed::records`], and when the agent has no record.
    pub fn last_record(&self, host: usize) -> Result<Value> {
        let last = self.records(host)?.pop();
        last.with_context(|| format!("{} has no record", self.lab().vms()[host].name()))
    }

    /// Returns true if a migration to the VM host `to` must be exact: no packet of `streams` may be
    /// lost, doubled or reordered. Only agents with gates promise this, and only for migrations
    /// that they run themselves. A stream of identical packets is excluded, because its handover
    /// relies on timestamps. A late site is excluded, because packets are lost until the multicast
    /// tree has grown.
    fn promises<'a>(
        &self,
        mover: Mover,
        to: usize,
        streams: impl IntoIterator<Item = &'a Placed>,
    ) -> bool {
        let reaches = match self.lab().config().sites[to] {
            Site::Multicast => true,
            Site::UnicastOnly => self.relays.is_some(),
            Site::Late(_) => false,
        };
        let mut streams = streams.into_iter();
        matches!(mover, Mover::Migkick | Mover::Operator)
            && self.agents.is_some()
            && !self.limits.no_gate
            && reaches
            && streams.all(|stream| stream.config.kind != StreamKind::Identical)
    }

    /// Returns the agents for queries, which need no exclusive access.
    fn running_agents(&self) -> Result<&Agents> {
        self.agents
            .as_ref()
            .context("This testbed runs without agents")
    }

    /// Returns the relays.
    ///
    /// # Errors
    ///
    /// When the lab has no relay nodes, or the testbed is a baseline.
    pub fn relays(&mut self) -> Result<&mut Relays> {
        self.relays
            .as_mut()
            .context("This testbed runs without relays")
    }

    /// Returns the mapping server and the correspondent.
    ///
    /// # Errors
    ///
    /// When the lab's configuration has no mobility.
    pub fn mobility(&mut self) -> Result<&mut Mobility> {
        self.mobility
            .as_mut()
            .context("This testbed runs without mobility")
    }

    /// Returns the node in the first guest.
    ///
    /// # Errors
    ///
    /// When the guest has not been booted, or the lab has no mobility.
    pub fn guest_node(&self) -> Result<&GuestNode> {
        self.node.as_ref().context("The guest has no node")
    }

    /// Starts sessions between the correspondent and the guest, if the lab has mobility.
    fn converse(&self) -> Result<Option<Sessions>> {
        if self.mobility.is_none() {
            return Ok(None);
        }
        Sessions::start(self.lab.peer()?, self.guest()?).map(Some)
    }

    /// Starts the agent of a VM host again after [`Agents::kill`] and waits until it answers.
    ///
    /// # Errors
    ///
    /// When the testbed is a baseline, or the agent does not become ready.
    pub fn restart_agent(&mut self, index: usize) -> Result<()> {
        let Self { agents, lab, .. } = self;
        let agents = agents
            .as_mut()
            .context("This testbed runs without agents")?;
        agents.restart(lab, index)
    }

    /// Returns the names of the VM hosts on which libvirt shows the first guest as running.
    pub fn running_on(&self) -> Vec<&str> {
        self.domain_running_on(&self.domain.name)
    }

    fn domain_running_on(&self, domain: &str) -> Vec<&str> {
        self.lab
            .vms()
            .iter()
            .filter(|vms| state(vms, domain).as_deref() == Some("running"))
            .map(|vms| vms.name())
            .collect()
    }
}

/// Prints the logs of the agents, of the relays and of the guest's node, and the agents' counters
/// and migration records, if the test fails.
impl Drop for Testbed {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        if let Some(agents) = &self.agents {
            for vms in self.lab.vms() {
                let migrations = agents.query(vms, "migrations").unwrap_or_default();
                let counters = agents
                    .query(vms, "status")
                    .map(|status| status["counters"].clone());
                let log = agents.log(vms);
                eprintln!("Agent on {}: {migrations}", vms.name());
                eprintln!("Counted: {}\n{log}", counters.unwrap_or_default());
            }
        }
        if let Some(relays) = &self.relays {
            for index in 0..self.lab.relays().len() {
                eprintln!("Relay {index}:\n{}", relays.log(index));
            }
        }
        if let Some(node) = &self.node {
            eprintln!("Node:\n{}", node.log());
        }
    }
}

/// Returns the last `count` lines of a log.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(count)..)
        .unwrap_or_default()
        .join("\n")
}

/// Returns the line `name = value` of a configuration. Without a value the text is empty, and the
/// program uses its default.
fn key(name: &str, value: Option<impl std::fmt::Display>) -> String {
    value.map_or_else(String::new, |value| format!("{name} = {value}"))
}

/// Runs virsh on a VM host and returns its output.
///
/// # Errors
///
/// When virsh fails; the text holds its error message.
pub fn virsh(vms: &Vms, arguments: &[&str]) -> Result<String> {
    let mut command: Command = vms.virsh();
    command.args(arguments);
    vms.output(&mut command)
}

/// Returns the state of a domain by `virsh domstate`; `None` if the host does not know the domain.
pub fn state(vms: &Vms, domain: &str) -> Option<String> {
    virsh(vms, &["domstate", domain])
        .ok()
        .map(|text| text.trim().to_owned())
}

/// Checks that the first guest runs on this VM host and on no other.
///
/// # Errors
///
/// When the guest does not run there, or also runs elsewhere. The text names its VM hosts.
pub fn ensure_runs_only_on(testbed: &Testbed, host: &str) -> Result<()> {
    ensure_domain_runs_only_on(testbed, testbed.domain_name(), host)
}

fn ensure_domain_runs_only_on(testbed: &Testbed, domain: &str, host: &str) -> Result<()> {
    let hosts = testbed.domain_running_on(domain);
    ensure!(
        hosts == [host],
        "{domain} should run on {host} only but runs on {hosts:?}"
    );
    Ok(())
}

/// Returns the name of a site in reports.
fn site_name(site: Site) -> &'static str {
    match site {
        Site::Multicast => "multicast",
        Site::Late(_) => "late",
        Site::UnicastOnly => "unicast-only",
    }
}
