//! The whole lab: builds namespaces, links, router and VM hosts, and removes them.

use std::fmt;
use std::fs;
use std::net::Ipv6Addr;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use crate::mroute::control::Router;
use crate::mroute::daemon::{Settings as RouterSettings, SiteSettings};
use crate::node::{Node, namespace};
use crate::registry::{self, Record};
use crate::vms::node::{LOG_LABEL, READY_FILE, Settings as VmsSettings};
use crate::vms::{self, Vms};
use crate::{binaries, netns, signal, wait};

/// Address of the sender.
pub const SENDER_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);

/// Address of the router on the sender's link.
const ROUTER_SENDER_ADDRESS: &str = "2001:db8::1/64";

/// What a site's network does with multicast.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Site {
    /// The tree reaches the site at once.
    Multicast,
    /// The tree takes this many milliseconds to grow after the first MLD Report for an address.
    Late(u64),
    /// The site gets no multicast.
    UnicastOnly,
}

impl Site {
    /// How long after the first Report packets arrive; `None` for never.
    #[must_use]
    pub fn growth_delay(self) -> Option<Duration> {
        match self {
            Self::Multicast => Some(Duration::ZERO),
            Self::Late(milliseconds) => Some(Duration::from_millis(milliseconds)),
            Self::UnicastOnly => None,
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Multicast => formatter.write_str("multicast"),
            Self::Late(milliseconds) => write!(formatter, "late {milliseconds} ms"),
            Self::UnicastOnly => formatter.write_str("unicast-only"),
        }
    }
}

impl FromStr for Site {
    type Err = anyhow::Error;

    /// Parses `multicast`, `late` (1000 ms), `late=MS` or `unicast-only`.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "multicast" => Ok(Self::Multicast),
            "late" => Ok(Self::Late(1000)),
            "unicast-only" => Ok(Self::UnicastOnly),
            _ => match text.strip_prefix("late=").map(str::parse) {
                Some(Ok(milliseconds)) => Ok(Self::Late(milliseconds)),
                _ => bail!("No such site {text:?}: take multicast, late, late=MS or unicast-only"),
            },
        }
    }
}

/// How a lab is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabConfig {
    /// Name of 1 to 16 letters a-z and digits; labs of different names live side by side.
    pub name: String,
    /// The network of VMS 1 and of VMS 2 at first.
    pub sites: [Site; 2],
    /// Interval of the switches' MLD General Queries.
    pub query_interval: Duration,
    /// Whether libvirtd runs on the VM hosts.
    pub libvirtd: bool,
}

impl LabConfig {
    /// A lab with multicast at both sites, the query interval of RFC 9777 section 9.2 (125 s) and
    /// libvirtd.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            sites: [Site::Multicast; 2],
            query_interval: Duration::from_secs(125),
            libvirtd: true,
        }
    }
}

/// A running lab. Dropping it removes it, unless [`Lab::keep`] was called.
#[derive(Debug)]
pub struct Lab {
    config: LabConfig,
    /// This value is to remove the lab.
    owned: bool,
    vms: [Vms; 2],
}

impl Lab {
    /// Builds a lab. One of the same name is replaced, and what crashed programs have left of any
    /// lab is removed.
    ///
    /// # Errors
    ///
    /// When not run as root, or when a part can't be built; what was built by then is removed.
    pub fn up(config: LabConfig) -> Result<Self> {
        ensure!(
            Uid::effective().is_root(),
            "The lab needs root: it makes network namespaces"
        );
        registry::check_name(&config.name)?;
        let _lock = registry::lock()?;
        registry::sweep()?;
        registry::remove(&config.name)?;
        signal::guard(&config.name);
        let record = Record::of_this_process(config.clone());
        let built = registry::write(&record)
            .and_then(|()| build(&config))
            .and_then(|vms| {
                registry::write(&Record {
                    ready: true,
                    ..record
                })?;
                Ok(vms)
            });
        match built {
            Ok(vms) => Ok(Self {
                config,
                owned: true,
                vms,
            }),
            Err(error) => {
                signal::release(&config.name);
                match registry::remove(&config.name) {
                    Ok(()) => Err(error),
                    Err(second) => {
                        Err(error.context(format!("And removing it failed: {second:#}")))
                    }
                }
            }
        }
    }

    /// Returns a running lab that another process built and kept. Dropping it leaves it running.
    ///
    /// # Errors
    ///
    /// When there is no complete lab of that name.
    pub fn attach(name: &str) -> Result<Self> {
        let record = registry::read(name)?;
        ensure!(
            record.ready,
            "The lab {name} is not complete: run `cargo xtask lab up`"
        );
        let vms = [vms_of(&record.config, 1)?, vms_of(&record.config, 2)?];
        Ok(Self {
            config: record.config,
            owned: false,
            vms,
        })
    }

    /// Leaves the lab running when this process ends.
    ///
    /// # Errors
    ///
    /// When that can't be written down.
    pub fn keep(mut self) -> Result<()> {
        let record = registry::read(&self.config.name)?;
        registry::write(&Record {
            kept: true,
            ..record
        })?;
        self.owned = false;
        signal::release(&self.config.name);
        Ok(())
    }

    /// Removes the lab.
    ///
    /// # Errors
    ///
    /// When a process, namespace or directory can't be removed.
    pub fn down(mut self) -> Result<()> {
        self.owned = false;
        signal::release(&self.config.name);
        let _lock = registry::lock()?;
        registry::remove(&self.config.name)
    }

    /// How the lab was asked for.
    #[must_use]
    pub fn config(&self) -> &LabConfig {
        &self.config
    }

    /// The node that streams are sent from, at [`SENDER_ADDRESS`] on `eth0`.
    #[must_use]
    pub fn sender(&self) -> Node {
        node_of(&self.config.name, "sender")
    }

    /// The node of the router, with the interfaces `sender`, `site1` and `site2`.
    #[must_use]
    pub fn router_node(&self) -> Node {
        node_of(&self.config.name, "router")
    }

    /// The router's multicast routing.
    #[must_use]
    pub fn router(&self) -> Router {
        Router::new(registry::directory(&self.config.name))
    }

    /// The access switch of a site (1 or 2): bridge `br0` with the ports `router` and `vms1` or
    /// `vms2`.
    #[must_use]
    pub fn switch(&self, site: usize) -> Node {
        node_of(&self.config.name, &format!("switch{site}"))
    }

    /// Both VM hosts.
    #[must_use]
    pub fn vms(&self) -> &[Vms; 2] {
        &self.vms
    }

    /// The VM host of site 1, where guests start.
    #[must_use]
    pub fn vms1(&self) -> &Vms {
        &self.vms[0]
    }

    /// The VM host of site 2.
    #[must_use]
    pub fn vms2(&self) -> &Vms {
        &self.vms[1]
    }

    /// Returns a node of any kind by its name, as `vms1`.
    ///
    /// # Errors
    ///
    /// When there is none of that name; the text lists those there are.
    pub fn node(&self, name: &str) -> Result<Node> {
        if let Some(vms) = self.vms.iter().find(|vms| vms.name() == name) {
            return Ok((**vms).clone());
        }
        ensure!(
            NODES.contains(&name),
            "The lab has no node {name:?}: take one of {}",
            NODES.join(", ")
        );
        Ok(node_of(&self.config.name, name))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        signal::release(&self.config.name);
        let removed = registry::lock().and_then(|_lock| registry::remove(&self.config.name));
        if let Err(error) = removed {
            eprintln!("Failed to remove lab {}: {error:#}", self.config.name);
        }
    }
}

impl Record {
    fn of_this_process(config: LabConfig) -> Self {
        let owner = i32::try_from(std::process::id()).unwrap_or_default();
        let owner_started = registry::started(owner).unwrap_or_default();
        Self {
            config,
            owner,
            owner_started,
            kept: false,
            ready: false,
        }
    }
}

/// Names of all nodes.
pub const NODES: [&str; 6] = ["sender", "router", "switch1", "switch2", "vms1", "vms2"];

fn node_of(lab: &str, name: &str) -> Node {
    Node::new(lab, name, registry::directory(lab).join("log"), None)
}

fn vms_of(config: &LabConfig, site: usize) -> Result<Vms> {
    let name = format!("vms{site}");
    let directory = registry::directory(&config.name).join(&name);
    let ready = directory.join(READY_FILE);
    let holder: i32 = fs::read_to_string(&ready)
        .with_context(|| format!("{name} does not run: {}", ready.display()))?
        .trim()
        .parse()
        .with_context(|| format!("Not a process id in {}", ready.display()))?;
    let logs = registry::directory(&config.name).join("log");
    let node = Node::new(&config.name, &name, logs, Some(holder));
    Ok(Vms::new(node, vms_address(site), directory))
}

/// Global address of a VMS: host 0x10 of the prefix `2001:db8:<site>::/64`.
fn vms_address(site: usize) -> Ipv6Addr {
    let site = u16::try_from(site).unwrap_or_default();
    Ipv6Addr::new(0x2001, 0xdb8, site, 0, 0, 0, 0, 0x10)
}

fn build(config: &LabConfig) -> Result<[Vms; 2]> {
    let lab = &config.name;
    for node in NODES {
        netns::add(&namespace(lab, node))?;
    }
    let sender = namespace(lab, "sender");
    let router = namespace(lab, "router");
    netns::within(&router, || {
        netns::sysctl("net/ipv6/conf/all/forwarding", "1")
    })??;
    netns::ip(
        &sender,
        &format!(
            "link add eth0 type veth peer name sender netns {router}\n\
             link set eth0 up\n\
             addr add {SENDER_ADDRESS}/64 dev eth0 nodad\n"
        ),
    )?;
    netns::ip(
        &router,
        &format!("link set sender up\naddr add {ROUTER_SENDER_ADDRESS} dev sender nodad\n"),
    )?;
    netns::ip(
        &sender,
        "route add default via 2001:db8::1\nroute add ff00::/8 dev eth0 table local\n",
    )?;
    for site in 1..=2 {
        build_site(config, site)?;
    }
    start_router(config)?;
    let starting = [start_vms(config, 1)?, start_vms(config, 2)?];
    for (site, vms) in (1..).zip(&starting) {
        wait_router_port(vms)?;
        // Only the first round of the querier was to be short.
        let response = query_response_interval(config);
        netns::ip(
            &namespace(lab, &format!("switch{site}")),
            &format!("link set br0 type bridge mcast_query_response_interval {response}\n"),
        )?;
    }
    if config.libvirtd {
        for vms in &starting {
            vms.wait_libvirtd()?;
        }
        vms::capabilities::prime(&starting)?;
    }
    Ok(starting)
}

/// Builds a site: the router's interface, the switch and the uplink of the VMS.
fn build_site(config: &LabConfig, site: usize) -> Result<()> {
    let lab = &config.name;
    let router = namespace(lab, "router");
    let switch = namespace(lab, &format!("switch{site}"));
    let vms = namespace(lab, &format!("vms{site}"));
    let address = vms_address(site);
    // RFC 9777 section 9.4: an address nobody asks for any more is forgotten after 2 Query Intervals and the Query
    // Response Interval.
    let query = query_interval(config);
    let response = query_response_interval(config);
    let membership = 2 * query + 2 * response;
    netns::ip(
        &vms,
        &format!(
            "link add br0 type bridge mcast_snooping 1 mcast_mld_version 2 mcast_querier 0 \
               mcast_hash_max 131072\n\
             link add eth0 type veth peer name vms{site} netns {switch}\n\
             link set eth0 master br0\n\
             link set eth0 up\n\
             link set br0 up\n\
             addr add {address}/64 dev br0 nodad\n\
             route add default via 2001:db8:{site}::1\n"
        ),
    )?;
    // The bridge floods multicast until its querier has had time for one round, so that round
    // is made short; the real intervals follow it.
    netns::ip(
        &switch,
        &format!(
            "link add br0 type bridge mcast_snooping 1 mcast_mld_version 2 \
               mcast_hash_max 131072 mcast_query_response_interval 10 \
               mcast_startup_query_interval 25 mcast_startup_query_count 4 \
               mcast_query_interval {query} mcast_membership_interval {membership}\n\
             link add router type veth peer name site{site} netns {router}\n\
             link set router master br0\n\
             link set vms{site} master br0\n\
             link set router type bridge_slave mcast_router 2\n\
             link set router up\n\
             link set vms{site} up\n\
             link set br0 up\n\
             link set br0 type bridge mcast_querier 1\n"
        ),
    )?;
    netns::ip(
        &router,
        &format!("link set site{site} up\naddr add 2001:db8:{site}::1/64 dev site{site} nodad\n"),
    )
}

/// Query Interval in hundredths of a second, the unit of the bridge's timers.
fn query_interval(config: &LabConfig) -> u128 {
    (config.query_interval.as_millis() / 10).max(100)
}

/// Query Response Interval in hundredths of a second: RFC 9777 section 9.3 wants 10 s, and less
/// than the Query Interval.
fn query_response_interval(config: &LabConfig) -> u128 {
    (query_interval(config) / 2).min(1000)
}

fn start_router(config: &LabConfig) -> Result<()> {
    let lab = &config.name;
    let settings = RouterSettings {
        directory: registry::directory(lab),
        namespace: namespace(lab, "router"),
        sender: "sender".to_owned(),
        sites: (1..)
            .zip(config.sites)
            .map(|(site, kind)| SiteSettings {
                interface: format!("site{site}"),
                switch: namespace(lab, &format!("switch{site}")),
                uplink: "router".to_owned(),
                kind,
            })
            .collect(),
    };
    let node = node_of(lab, "router");
    let mut command = node.command(binaries::path("lab-node")?);
    command.arg("router").arg(serde_json::to_string(&settings)?);
    let mut process = node.spawn("mroute", command)?;
    let router = Router::new(registry::directory(lab));
    let up = wait::until("the router", Duration::from_secs(5), || {
        match process.try_wait() {
            Ok(None) => router.status().ok().map(|_| true),
            _ => Some(false),
        }
    })?;
    ensure!(up, "The router ended at once: {}", process.printed().trim());
    process.detach();
    Ok(())
}

fn start_vms(config: &LabConfig, site: usize) -> Result<Vms> {
    let lab = &config.name;
    let name = format!("vms{site}");
    let hosts = (1..=2).map(|site| format!("{} vms{site}\n", vms_address(site)));
    let settings = VmsSettings {
        hostname: name.clone(),
        namespace: netns::path(&namespace(lab, &name)),
        directory: registry::directory(lab).join(&name),
        host_uuid: format!("6f1b0c52-7d1e-4a5e-9c55-00000000000{site}"),
        hosts: format!(
            "127.0.0.1 localhost\n::1 localhost\n{}",
            hosts.collect::<String>()
        ),
        libvirtd: config.libvirtd,
    };
    vms::capabilities::restore(&settings.directory)?;
    let node = node_of(lab, &name);
    let mut command = node.command(binaries::path("lab-node")?);
    command.arg("vms").arg(serde_json::to_string(&settings)?);
    let mut process = node.spawn(LOG_LABEL, command)?;
    let ready = settings.directory.join(READY_FILE);
    let up = wait::until(&name, Duration::from_secs(5), || match process.try_wait() {
        Ok(None) => ready.exists().then_some(true),
        _ => Some(false),
    })?;
    ensure!(up, "{name} ended at once: {}", process.printed().trim());
    process.detach();
    vms_of(config, site)
}

/// Waits until the VMS's bridge has heard the switch's querier: from then on both forward by
/// membership.
fn wait_router_port(vms: &vms::Vms) -> Result<()> {
    let what = format!("an MLD Query from the switch on {}", vms.name());
    wait::until(&what, Duration::from_secs(10), || {
        let mut command = vms.command("bridge");
        let said = vms
            .output(command.args(["-d", "mdb", "show", "dev", "br0"]))
            .ok()?;
        said.contains("router ports on br0").then_some(())
    })
}
