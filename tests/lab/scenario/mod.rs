//! A virtual machine under a stream, and its move: what the demo, the VM tests and the benches do.
//!
//! ```text
//! Testbed::up -> boot -> Stream::start -> wait_streaming -> moved by migkick, roamcast or virsh -> finish
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`agents`] | certificates, configuration and processes of the two agents |
//! | [`stream`] | the sender's streams and the guest's receivers |
//! | [`mobility`] | the mapping server, the correspondent, and the guest's node |
//! | [`mod@sessions`] | sessions between the correspondent and the guest |
//! | [`relays`] | configuration and processes of the relays |
//! | [`flap`] | multicast taken away from the guest's site and given back |
//! | [`shuttle`] | one guest moved to and fro under its streams |
//! | [`crossing`] | two guests that change places at the same time |
//! | [`mod@measure`] | one whole run: a [`RunRow`](crate::probe::report::RunRow) and what happened when |

pub mod agents;
pub mod crossing;
pub mod flap;
pub mod measure;
pub mod mobility;
mod mover;
mod party;
pub mod relays;
pub mod sessions;
pub mod shuttle;
pub mod stream;
mod tally;

use std::fs;
use std::net::Ipv6Addr;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest::control::{Control, HostSocket};
use crate::guest::domain::{self, Accelerator, Bandwidth, DomainConfig, NicDriver};
use crate::guest::image;
use crate::vms::Vms;
use crate::{Lab, LabConfig, Site, kvm, wait};
use agents::{AgentOptions, Agents};
use mobility::{GuestNode, Mobility};
use relays::Relays;
use sessions::Sessions;

/// Where guests receive: the first of the lab's streams.
pub const STREAM_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xff1e, 0, 0, 0, 0, 0, 0x4000, 0x1);
/// The stream's UDP port.
pub const STREAM_PORT: u16 = 5004;

/// How long a guest may take from power-on until it answers; under TCG on two busy cores.
const BOOT: Duration = Duration::from_secs(90);

/// A lab with one guest, and an agent on each VM host unless it is a baseline.
pub struct Testbed {
    /// Dropped first: it talks to what the lab houses.
    control: Option<Control>,
    node: Option<GuestNode>,
    mobility: Option<Mobility>,
    agents: Option<Agents>,
    /// What agents would be told about migrations, for plain ones.
    limits: AgentOptions,
    relays: Option<Relays>,
    domain: DomainConfig,
    /// Guests beside the first.
    further: Vec<DomainConfig>,
    lab: Lab,
}

impl Testbed {
    /// Builds the lab, and starts the agents unless it is a baseline.
    ///
    /// # Errors
    ///
    /// When a part cannot be built or an agent does not become ready.
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

    /// Lets plain libvirt move guests by the limits and flags that agents of these options would
    /// use; without it by those of [`AgentOptions::DEFAULT`].
    #[must_use]
    pub fn with_limits_of(mut self, options: AgentOptions) -> Self {
        self.limits = options;
        self
    }

    /// The lab.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Name of the guest's libvirt domain.
    pub fn domain_name(&self) -> &str {
        &self.domain.name
    }

    /// How the guest is built.
    pub fn domain(&self) -> &DomainConfig {
        &self.domain
    }

    /// Limits the NICs of the guest from its next boot on.
    pub fn limit(&mut self, bandwidth: Option<Bandwidth>) {
        self.domain.bandwidth = bandwidth;
    }

    /// Has the NICs of guests read so from their next boot on.
    pub fn read_nics_by(&mut self, driver: NicDriver) {
        self.domain.driver = driver;
    }

    /// The agents.
    ///
    /// # Errors
    ///
    /// When there are none: the testbed is a baseline.
    pub fn agents(&mut self) -> Result<&mut Agents> {
        self.agents
            .as_mut()
            .context("This testbed runs without agents")
    }

    /// The agents, for asking them only.
    fn running_agents(&self) -> Result<&Agents> {
        self.agents
            .as_ref()
            .context("This testbed runs without agents")
    }

    /// The relays.
    ///
    /// # Errors
    ///
    /// When there are none: the lab has no relay nodes, or the testbed is a baseline.
    pub fn relays(&mut self) -> Result<&mut Relays> {
        self.relays
            .as_mut()
            .context("This testbed runs without relays")
    }

    /// The mapping server and the correspondent.
    ///
    /// # Errors
    ///
    /// When the lab was asked for without mobility.
    pub fn mobility(&mut self) -> Result<&mut Mobility> {
        self.mobility
            .as_mut()
            .context("This testbed runs without mobility")
    }

    /// The node in the guest.
    ///
    /// # Errors
    ///
    /// When the guest has not been booted, or the lab has no mobility.
    pub fn guest_node(&self) -> Result<&GuestNode> {
        self.node.as_ref().context("The guest has no node")
    }

    /// Lets the correspondent and the guest talk, where the lab has mobility.
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
    /// When there are no agents, or this one does not become ready.
    pub fn restart_agent(&mut self, index: usize) -> Result<()> {
        let Self { agents, lab, .. } = self;
        let agents = agents
            .as_mut()
            .context("This testbed runs without agents")?;
        agents.restart(lab, index)
    }

    /// The guest's control channel.
    ///
    /// # Errors
    ///
    /// When the guest has not been booted.
    pub fn guest(&self) -> Result<&Control> {
        self.control
            .as_ref()
            .context("The guest has not been booted")
    }

    /// Boots the guest on the first VM host; those that run are thrown away before.
    ///
    /// # Errors
    ///
    /// When libvirt refuses, or the guest does not answer in time.
    pub fn boot(&mut self) -> Result<()> {
        self.discard_guests()?;
        let control = self.start_guest(&self.domain, 0)?;
        if let Some(mobility) = &self.mobility {
            self.node = Some(mobility.join(&control)?);
        }
        self.control = Some(control);
        Ok(())
    }

    /// Boots another guest on the first VM host beside those that run: `guest2` and so on.
    ///
    /// # Errors
    ///
    /// As [`Testbed::boot`].
    pub fn boot_further(&mut self, number: u8) -> Result<Control> {
        self.boot_further_on(number, 0).map(|(_, control)| control)
    }

    /// The same on the VM host of that index; returns the name of the guest's domain too.
    fn boot_further_on(&mut self, number: u8, host: usize) -> Result<(String, Control)> {
        let domain = DomainConfig {
            memory_mib: self.domain.memory_mib,
            driver: self.domain.driver,
            ..DomainConfig::numbered(number, self.domain.image.clone(), self.domain.accelerator)
        };
        let name = domain.name.clone();
        let control = self.start_guest(&domain, host)?;
        self.further.push(domain);
        Ok((name, control))
    }

    fn start_guest(&self, domain: &DomainConfig, host: usize) -> Result<Control> {
        let sockets: Vec<HostSocket> = self
            .lab
            .vms()
            .iter()
            .map(|vms| HostSocket {
                host: vms.name().to_owned(),
                path: vms.shared_directory().join(domain.socket_name()),
            })
            .collect();
        for vms in self.lab.vms() {
            let directory = vms.libvirt_log_directory().join("qemu");
            fs::create_dir_all(&directory)
                .with_context(|| format!("Failed to create {}", directory.display()))?;
        }
        let control = Control::listen(&sockets)?;
        let vms = &self.lab.vms()[host];
        let xml = vms.shared_directory().join("domain.xml");
        fs::write(&xml, domain::xml(domain)).context("Failed to write the domain's XML")?;
        // The directory has this name on the VM host itself.
        let on_host = format!("{}/domain.xml", domain::SOCKET_DIRECTORY);
        virsh(vms, &["define", &on_host])?;
        virsh(vms, &["start", &domain.name])?;
        control
            .wait_ready(BOOT)
            .with_context(|| last_words(vms, &domain.name))?;
        Ok(control)
    }

    fn discard_guests(&mut self) -> Result<()> {
        self.node = None;
        self.control = None;
        let further = std::mem::take(&mut self.further);
        for name in further
            .iter()
            .map(|domain| &domain.name)
            .chain([&self.domain.name])
        {
            for vms in self.lab.vms() {
                if state(vms, name).is_some_and(|state| state != "shut off") {
                    virsh(vms, &["destroy", name])?;
                }
                if state(vms, name).is_some() {
                    virsh(vms, &["undefine", name])?;
                }
            }
        }
        if let Some(agents) = &self.agents {
            let [vms1, _] = self.lab.vms();
            wait::until(
                "the agents to forget the guest",
                Duration::from_secs(20),
                || {
                    let listeners = agents.query(vms1, "listeners").ok()?;
                    listeners
                        .as_array()
                        .is_some_and(Vec::is_empty)
                        .then_some(())
                },
            )?;
        }
        Ok(())
    }

    /// Names of the VM hosts on which the guest's CPUs run now, by libvirt.
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

/// A test that fails says what its programs knew.
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

/// What libvirt and the serial console say of a guest that does not come up.
fn last_words(vms: &Vms, domain: &str) -> String {
    let state = virsh(vms, &["domstate", "--reason", domain]);
    let console = vms
        .libvirt_log_directory()
        .join(format!("qemu/{domain}-serial.log"));
    let console = fs::read_to_string(console).unwrap_or_default();
    format!(
        "{domain} is {}; its console ends with {:?}",
        state.unwrap_or_default().trim(),
        last_lines(&console, 5)
    )
}

/// The last lines of a log.
fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(count)..)
        .unwrap_or_default()
        .join("\n")
}

/// A line of a configuration, or nothing for the default.
fn key(name: &str, value: Option<impl std::fmt::Display>) -> String {
    value.map_or_else(String::new, |value| format!("{name} = {value}"))
}

/// Runs virsh on a VM host and returns what it printed.
///
/// # Errors
///
/// When it fails; the text holds its last words.
pub fn virsh(vms: &Vms, arguments: &[&str]) -> Result<String> {
    let mut command: Command = vms.virsh();
    command.args(arguments);
    vms.output(&mut command)
}

/// State of a domain by `virsh domstate`; `None` where the host does not know it.
pub fn state(vms: &Vms, domain: &str) -> Option<String> {
    virsh(vms, &["domstate", domain])
        .ok()
        .map(|text| text.trim().to_owned())
}

/// Fails unless the guest runs on exactly this VM host.
///
/// # Errors
///
/// The text names where it runs.
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

/// A site in the words of the report.
fn site_name(site: Site) -> &'static str {
    match site {
        Site::Multicast => "multicast",
        Site::Late(_) => "late",
        Site::UnicastOnly => "unicast-only",
    }
}
