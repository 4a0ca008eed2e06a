//! The whole lab as one value: builds, attaches and removes it, and returns its parts.

use std::fmt;
use std::net::Ipv6Addr;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use crate::build::Built;
use crate::host::Host;
use crate::mroute::control::Router;
use crate::node::Node;
use crate::registry::{self, Record};
use crate::vms::Vms;
use crate::{build, signal, switch, wait};

/// Address of the sender.
pub const SENDER_ADDRESS: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);

/// Names of the hosts for mobility: the mapping server's host and the correspondent.
const IMS: &str = "ims1";
const PEER: &str = "peer1";

/// Time limit for the router to prune a tree without listeners.
const PRUNE: Duration = Duration::from_secs(10);

/// Multicast in a site's network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Site {
    /// The tree reaches the site at once.
    Multicast,
    /// The tree needs this many milliseconds to grow after the first MLD Report for an address.
    Late(u64),
    /// The site gets no multicast.
    UnicastOnly,
}

impl Site {
    /// Returns the time from the first Report to the first packet; `None` if no packet ever
    /// arrives.
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

/// Configuration of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabConfig {
    /// Name of 1 to 16 letters a-z and digits. Labs with different names exist side by side.
    pub name: String,
    /// Multicast at the sites of VMS 1 and VMS 2 after the start.
    pub sites: [Site; 2],
    /// Interval of the switches' MLD General Queries.
    pub query_interval: Duration,
    /// True if libvirtd runs on the VM hosts.
    pub libvirtd: bool,
    /// Number of relay nodes, 0 to 2. The relays have a site of their own, which multicast always
    /// reaches.
    #[serde(default)]
    pub relays: usize,
    /// True if both VM hosts are at site 1 and site 2 does not exist, for live migration within a
    /// subnet. Such a lab has no relays.
    #[serde(default)]
    pub same_subnet: bool,
    /// True if the relays' site has two more hosts: `ims1` for a mapping server, and `peer1` as the
    /// correspondent of mobile guests. Such a lab has two subnets.
    #[serde(default)]
    pub mobility: bool,
}

impl LabConfig {
    /// Returns a lab with multicast at both sites, the query interval of RFC 9777 section 9.2 (125
    /// s) and libvirtd.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            sites: [Site::Multicast; 2],
            query_interval: Duration::from_secs(125),
            libvirtd: true,
            relays: 0,
            same_subnet: false,
            mobility: false,
        }
    }

    /// Returns the site of a VM host by its number, 1 or 2.
    #[must_use]
    pub fn site_of(&self, vms: usize) -> usize {
        if self.same_subnet { 1 } else { vms }
    }

    /// Returns the numbers of the sites with VM hosts.
    #[must_use]
    pub fn vms_sites(&self) -> RangeInclusive<usize> {
        1..=self.site_of(2)
    }

    /// Returns the names of all nodes.
    #[must_use]
    pub fn nodes(&self) -> Vec<String> {
        let mut names = vec!["sender".to_owned(), "router".to_owned()];
        names.extend(self.vms_sites().map(|site| format!("switch{site}")));
        names.extend((1..=2).map(|number| format!("vms{number}")));
        let at_relay_site = self.at_relay_site();
        if !at_relay_site.is_empty() {
            names.push(format!("switch{RELAY_SITE}"));
        }
        names.extend(at_relay_site.into_iter().map(|(name, _)| name));
        names
    }

    /// Returns the hosts at the relays' site with their addresses. The site exists only if it has
    /// hosts. Relays are hosts 0x10 and up of the prefix `2001:db8:3::/64`.
    pub(crate) fn at_relay_site(&self) -> Vec<(String, Ipv6Addr)> {
        let address = |host| Ipv6Addr::new(0x2001, 0xdb8, 3, 0, 0, 0, 0, host);
        let relays = (0x10..).zip(1..=self.relays);
        let relays = relays.map(|(host, number)| (format!("relay{number}"), address(host)));
        let mobility = [(IMS, address(0x20)), (PEER, address(0x30))]
            .map(|(name, address)| (name.to_owned(), address));
        relays
            .chain(mobility.into_iter().filter(|_| self.mobility))
            .collect()
    }
}

/// A running lab. Dropping the value removes the lab, unless the lab was attached or [`Lab::keep`]
/// was called.
#[derive(Debug)]
pub struct Lab {
    config: LabConfig,
    /// True if dropping this value removes the lab.
    owned: bool,
    vms: [Vms; 2],
    /// Hosts at the relays' site, relays first.
    further: Vec<Host>,
}

impl Lab {
    /// Builds a lab. Replaces a kept lab of the same name, and removes the remains that crashed
    /// programs left of any lab.
    ///
    /// # Errors
    ///
    /// When the caller is not root, when another running process owns a lab of that name, or when a
    /// part can't be built; the built parts are then removed.
    pub fn up(config: LabConfig) -> Result<Self> {
        ensure!(
            Uid::effective().is_root(),
            "The lab needs root: it makes network namespaces"
        );
        registry::check_name(&config.name)?;
        ensure!(config.relays <= 2, "A lab has at most two relays");
        ensure!(
            config.at_relay_site().is_empty() || !config.same_subnet,
            "A lab of one subnet has no relays, and no hosts for mobility"
        );
        let lock = registry::lock()?;
        registry::sweep()?;
        registry::check_free(&config.name)?;
        registry::remove(&config.name)?;
        signal::guard(&config.name);
        let built = Self::build(&config).map_err(|error| match registry::remove(&config.name) {
            Ok(()) => error,
            Err(second) => error.context(format!("And removing it failed: {second:#}")),
        });
        drop(lock);
        if built.is_err() {
            signal::release(&config.name);
        }
        let Built { vms, further } = built?;
        Ok(Self {
            vms,
            further,
            config,
            owned: true,
        })
    }

    fn build(config: &LabConfig) -> Result<Built> {
        let record = Record::of_this_process(config.clone());
        registry::write(&record)?;
        let built = build::all(config)?;
        registry::write(&Record {
            ready: true,
            ..record
        })?;
        Ok(built)
    }

    /// Returns a running lab that another process built and kept. Dropping the value leaves the lab
    /// running.
    ///
    /// # Errors
    ///
    /// When no complete lab of that name exists.
    pub fn attach(name: &str) -> Result<Self> {
        let record = registry::read(name)?;
        ensure!(
            record.ready,
            "The lab {name} is not complete: run `cargo xtask lab up`"
        );
        let Built { vms, further } = build::attach(&record.config)?;
        Ok(Self {
            config: record.config,
            owned: false,
            vms,
            further,
        })
    }

    /// Leaves the lab running when this process ends.
    ///
    /// # Errors
    ///
    /// When the record can't be written.
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
        let removed = registry::down(&self.config.name);
        signal::release(&self.config.name);
        removed
    }

    /// Returns the configuration of the lab.
    #[must_use]
    pub fn config(&self) -> &LabConfig {
        &self.config
    }

    /// Returns the sender's node, at [`SENDER_ADDRESS`] on `eth0`.
    #[must_use]
    pub fn sender(&self) -> Node {
        build::node(&self.config.name, "sender")
    }

    /// Returns the router's node, with the interfaces `sender`, `site1` and `site2`.
    #[must_use]
    pub fn router_node(&self) -> Node {
        build::node(&self.config.name, "router")
    }

    /// Returns the handle of the router's multicast routing.
    #[must_use]
    pub fn router(&self) -> Router {
        Router::new(registry::directory(&self.config.name))
    }

    /// Returns the access switch of a site (1 or 2): bridge `br0` with the ports `router` and
    /// `vms1` or `vms2`, or with both VM hosts if they share a subnet.
    #[must_use]
    pub fn switch(&self, site: usize) -> Node {
        build::node(&self.config.name, &format!("switch{site}"))
    }

    /// Returns the nodes on the path of a stream from the router to the guests: the router, the
    /// switches and the VM hosts.
    #[must_use]
    pub fn path(&self) -> Vec<Node> {
        let switches = self.config.vms_sites().map(|site| self.switch(site));
        let hosts = self.vms.iter().map(|vms| (***vms).clone());
        std::iter::once(self.router_node())
            .chain(switches)
            .chain(hosts)
            .collect()
    }

    /// Makes the switches forget the listeners of some multicast addresses, as if no listener had
    /// answered Queries for minutes. Waits until no site receives the addresses.
    ///
    /// # Errors
    ///
    /// When an entry can't be removed, or a site still receives an address.
    pub fn forget_listeners(&self, addresses: &[Ipv6Addr]) -> Result<()> {
        for site in self.config.vms_sites() {
            switch::forget(&self.switch(site), addresses)?;
        }
        let router = self.router();
        wait::until("the trees to be pruned", PRUNE, || {
            let sites = router.status().ok()?.sites;
            let mut grown = sites.iter().flat_map(|site| &site.grown);
            (!grown.any(|address| addresses.contains(address))).then_some(())
        })
    }

    /// Returns both VM hosts.
    #[must_use]
    pub fn vms(&self) -> &[Vms; 2] {
        &self.vms
    }

    /// Returns the VM host of site 1, where guests start.
    #[must_use]
    pub fn vms1(&self) -> &Vms {
        &self.vms[0]
    }

    /// Returns the second VM host, at site 2 unless both share a subnet.
    #[must_use]
    pub fn vms2(&self) -> &Vms {
        &self.vms[1]
    }

    /// Returns the existing relay nodes: `relay1` and `relay2`.
    #[must_use]
    pub fn relays(&self) -> &[Host] {
        self.further.get(..self.config.relays).unwrap_or_default()
    }

    /// Returns the host of the mapping server.
    ///
    /// # Errors
    ///
    /// When the lab has no hosts for mobility.
    pub fn ims(&self) -> Result<&Host> {
        self.further(IMS)
    }

    /// Returns the correspondent of mobile guests.
    ///
    /// # Errors
    ///
    /// When the lab has no hosts for mobility.
    pub fn peer(&self) -> Result<&Host> {
        self.further(PEER)
    }

    fn further(&self, name: &str) -> Result<&Host> {
        let found = self.further.iter().find(|host| host.name() == name);
        found.with_context(|| format!("The lab has no {name}: ask for mobility"))
    }

    /// Returns a node of any kind by its name, such as `vms1`.
    ///
    /// # Errors
    ///
    /// When no node has that name; the text lists the names of all nodes.
    pub fn node(&self, name: &str) -> Result<Node> {
        if let Some(vms) = self.vms.iter().find(|vms| vms.name() == name) {
            return Ok((***vms).clone());
        }
        if let Ok(host) = self.further(name) {
            return Ok((**host).clone());
        }
        let nodes = self.config.nodes();
        ensure!(
            nodes.iter().any(|node| node == name),
            "The lab has no node {name:?}: take one of {}",
            nodes.join(", ")
        );
        Ok(build::node(&self.config.name, name))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if let Err(error) = registry::down(&self.config.name) {
            eprintln!("Failed to remove lab {}: {error:#}", self.config.name);
        }
        signal::release(&self.config.name);
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

/// Number of the relays' site.
pub const RELAY_SITE: usize = 3;
