//! Builds a lab: namespaces, links, bridges, router and VM hosts.

use std::fs;
use std::net::Ipv6Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::host::Host;
use crate::mroute::control::Router;
use crate::mroute::daemon::{Settings as RouterSettings, SiteSettings};
use crate::node::{Node, namespace};
use crate::topology::{LabConfig, RELAY_SITE, SENDER_ADDRESS, Site};
use crate::vms::node::{LOG_LABEL, READY_FILE, Settings as HostSettings};
use crate::vms::{Vms, capabilities};
use crate::{binaries, netns, registry, switch, wait};

/// Address of the router on the sender's link.
const ROUTER_SENDER_ADDRESS: &str = "2001:db8::1/64";

pub(crate) fn node(lab: &str, name: &str) -> Node {
    Node::new(lab, name, registry::directory(lab).join("log"), None)
}

/// Returns a VM host by its number, 1 or 2.
pub(crate) fn vms(config: &LabConfig, number: usize) -> Result<Vms> {
    let address = vms_address(config, number);
    host(config, &format!("vms{number}"), address).map(Vms::new)
}

fn host(config: &LabConfig, name: &str, address: Ipv6Addr) -> Result<Host> {
    let directory = registry::directory(&config.name).join(name);
    let ready = directory.join(READY_FILE);
    let holder: i32 = fs::read_to_string(&ready)
        .with_context(|| format!("{name} does not run: {}", ready.display()))?
        .trim()
        .parse()
        .with_context(|| format!("Not a process id in {}", ready.display()))?;
    let logs = registry::directory(&config.name).join("log");
    let node = Node::new(&config.name, name, logs, Some(holder));
    Ok(Host::new(node, address, directory))
}

/// Returns the global address of a VMS: host 0x10 of the prefix `2001:db8:<site>::/64`, or 0x11 for
/// the second VMS of a site.
fn vms_address(config: &LabConfig, number: usize) -> Ipv6Addr {
    let site = config.site_of(number);
    let host = 0x10 + u16::from(site != number);
    let site = u16::try_from(site).unwrap_or_default();
    Ipv6Addr::new(0x2001, 0xdb8, site, 0, 0, 0, 0, host)
}

/// Hosts of a built lab.
pub(crate) struct Built {
    pub(crate) vms: [Vms; 2],
    /// Hosts at the relays' site.
    pub(crate) further: Vec<Host>,
}

/// Returns the hosts of a running lab.
pub(crate) fn attach(config: &LabConfig) -> Result<Built> {
    Ok(Built {
        vms: [vms(config, 1)?, vms(config, 2)?],
        further: config
            .at_relay_site()
            .into_iter()
            .map(|(name, address)| host(config, &name, address))
            .collect::<Result<_>>()?,
    })
}

pub(crate) fn all(config: &LabConfig) -> Result<Built> {
    let lab = &config.name;
    for node in config.nodes() {
        netns::add(&namespace(lab, &node))?;
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
    for number in 1..=2 {
        build_vms_links(config, number)?;
    }
    build_further_links(config)?;
    let sites = sites(config);
    for (site, hosts) in &sites {
        build_site(config, *site, hosts)?;
    }
    for (site, hosts) in &sites {
        start_querier(config, *site, hosts.len() + 1)?;
    }
    start_router(config)?;
    let starting = [start_vms(config, 1)?, start_vms(config, 2)?];
    for (number, (name, _)) in (3..).zip(config.at_relay_site()) {
        start_host(config, &name, number, false)?;
    }
    for vms in &starting {
        wait_router_port(vms)?;
    }
    for (site, _) in &sites {
        relax_querier(config, *site)?;
    }
    if config.libvirtd {
        for vms in &starting {
            vms.wait_libvirtd()?;
        }
        capabilities::prime(&starting)?;
    }
    attach(config)
}

/// Returns every site with the names of its hosts.
fn sites(config: &LabConfig) -> Vec<(usize, Vec<String>)> {
    let of_vms = config.vms_sites().map(|site| {
        let numbers = (1..=2).filter(|number| config.site_of(*number) == site);
        (site, numbers.map(|number| format!("vms{number}")).collect())
    });
    let further = config.at_relay_site().into_iter();
    let further: Vec<String> = further.map(|(name, _)| name).collect();
    of_vms
        .chain((!further.is_empty()).then_some((RELAY_SITE, further)))
        .collect()
}

/// Starts a switch's querier once the switch's ports forward. The switch loses earlier Reports of
/// the hosts, but the first round of Queries asks for them again.
fn start_querier(config: &LabConfig, site: usize, ports: usize) -> Result<()> {
    let switch = node(&config.name, &format!("switch{site}"));
    switch::wait_forwarding(&switch, ports)?;
    netns::ip(
        switch.namespace(),
        "link set br0 type bridge mcast_querier 1\n",
    )
}

/// Sets the regular intervals of a switch's querier after the short first round.
fn relax_querier(config: &LabConfig, site: usize) -> Result<()> {
    let response = query_response_interval(config);
    netns::ip(
        &namespace(&config.name, &format!("switch{site}")),
        &format!("link set br0 type bridge mcast_query_response_interval {response}\n"),
    )
}

/// Builds a VMS's bridge and its uplink to the switch.
fn build_vms_links(config: &LabConfig, number: usize) -> Result<()> {
    let site = config.site_of(number);
    let switch = namespace(&config.name, &format!("switch{site}"));
    let address = vms_address(config, number);
    // A bridge takes the lowest MAC of its ports. This MAC is below the MACs of libvirt's TAPs,
    // which begin with `fe`. A random MAC of the kernel for a veth may be above them; the host's
    // MAC would then change as VMs arrive and leave.
    let mac = format!("02:00:5e:10:{site:02x}:{number:02x}");
    netns::ip(
        &namespace(&config.name, &format!("vms{number}")),
        &format!(
            "link add br0 type bridge mcast_snooping 1 mcast_mld_version 2 mcast_querier 0 \
               mcast_hash_max 131072\n\
             link add eth0 address {mac} type veth peer name vms{number} netns {switch}\n\
             link set eth0 master br0\n\
             link set eth0 up\n\
             link set br0 up\n\
             addr add {address}/64 dev br0 nodad\n\
             route add default via 2001:db8:{site}::1\n"
        ),
    )
}

/// Connects the hosts at the relays' site to their switch.
fn build_further_links(config: &LabConfig) -> Result<()> {
    let switch = namespace(&config.name, &format!("switch{RELAY_SITE}"));
    for (name, address) in config.at_relay_site() {
        netns::ip(
            &namespace(&config.name, &name),
            &format!(
                "link add eth0 type veth peer name {name} netns {switch}\n\
                 link set eth0 up\n\
                 addr add {address}/64 dev eth0 nodad\n\
                 route add default via 2001:db8:{RELAY_SITE}::1\n"
            ),
        )?;
    }
    Ok(())
}

/// Builds a site: the switch and the router's interface, and connects the links of the hosts, whose
/// switch ends are already in the switch's namespace.
fn build_site(config: &LabConfig, site: usize, hosts: &[String]) -> Result<()> {
    let lab = &config.name;
    let router = namespace(lab, "router");
    // RFC 9777 section 9.4: the Multicast Address Listening Interval is 2 Query Intervals plus 2
    // Query Response Intervals.
    let query = query_interval(config);
    let response = query_response_interval(config);
    let membership = 2 * query + 2 * response;
    let ports: String = hosts
        .iter()
        .map(|host| format!("link set {host} master br0\nlink set {host} up\n"))
        .collect();
    // The bridge floods multicast until its querier has completed one round, so the first round is
    // short; the real intervals follow.
    netns::ip(
        &namespace(lab, &format!("switch{site}")),
        &format!(
            "link add br0 type bridge mcast_snooping 1 mcast_mld_version 2 \
               mcast_hash_max 131072 mcast_query_response_interval 10 \
               mcast_startup_query_interval 25 mcast_startup_query_count 4 \
               mcast_query_interval {query} mcast_membership_interval {membership}\n\
             link add router type veth peer name site{site} netns {router}\n\
             link set router master br0\n\
             link set router type bridge_slave mcast_router 2\n\
             link set router up\n\
             {ports}\
             link set br0 up\n"
        ),
    )?;
    netns::ip(
        &router,
        &format!("link set site{site} up\naddr add 2001:db8:{site}::1/64 dev site{site} nodad\n"),
    )
}

/// Returns the Query Interval in hundredths of a second, the unit of the bridge's timers.
fn query_interval(config: &LabConfig) -> u128 {
    (config.query_interval.as_millis() / 10).max(100)
}

/// Returns the Query Response Interval in hundredths of a second: 10 s as in RFC 9777 section 9.3,
/// but less than the Query Interval.
fn query_response_interval(config: &LabConfig) -> u128 {
    (query_interval(config) / 2).min(1000)
}

fn start_router(config: &LabConfig) -> Result<()> {
    let lab = &config.name;
    let vms_sites = config.sites.into_iter().take(config.site_of(2));
    let relay_site = (!config.at_relay_site().is_empty()).then_some(Site::Multicast);
    let settings = RouterSettings {
        directory: registry::directory(lab),
        namespace: namespace(lab, "router"),
        sender: "sender".to_owned(),
        sites: (1..)
            .zip(vms_sites.chain(relay_site))
            .map(|(site, kind)| SiteSettings {
                interface: format!("site{site}"),
                switch: namespace(lab, &format!("switch{site}")),
                uplink: "router".to_owned(),
                kind,
            })
            .collect(),
    };
    let node = node(lab, "router");
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

fn start_vms(config: &LabConfig, number: usize) -> Result<Vms> {
    let name = format!("vms{number}");
    capabilities::restore(&registry::directory(&config.name).join(&name))?;
    start_host(config, &name, number, config.libvirtd)?;
    vms(config, number)
}

/// Starts the process of a host; `number` is unique among all hosts.
fn start_host(config: &LabConfig, name: &str, number: usize, libvirtd: bool) -> Result<()> {
    let lab = &config.name;
    let vms = (1..=2).map(|n| format!("{} vms{n}\n", vms_address(config, n)));
    let further = config.at_relay_site().into_iter();
    let further = further.map(|(name, address)| format!("{address} {name}\n"));
    let settings = HostSettings {
        hostname: name.to_owned(),
        namespace: netns::path(&namespace(lab, name)),
        directory: registry::directory(lab).join(name),
        host_uuid: format!("6f1b0c52-7d1e-4a5e-9c55-00000000000{number}"),
        hosts: format!(
            "127.0.0.1 localhost\n::1 localhost\n{}",
            vms.chain(further).collect::<String>()
        ),
        libvirtd,
    };
    let node = node(lab, name);
    let mut command = node.command(binaries::path("lab-node")?);
    command.arg("host").arg(serde_json::to_string(&settings)?);
    let mut process = node.spawn(LOG_LABEL, command)?;
    let ready = settings.directory.join(READY_FILE);
    let up = wait::until(name, Duration::from_secs(5), || match process.try_wait() {
        Ok(None) => ready.exists().then_some(true),
        _ => Some(false),
    })?;
    ensure!(up, "{name} ended at once: {}", process.printed().trim());
    process.detach();
    Ok(())
}

/// Waits until the VMS's bridge has received a Query of the switch. From then on both bridges
/// forward by membership.
fn wait_router_port(vms: &Vms) -> Result<()> {
    let what = format!("an MLD Query from the switch on {}", vms.name());
    wait::until(&what, Duration::from_secs(10), || {
        let mut command = vms.command("bridge");
        let said = vms
            .output(command.args(["-d", "mdb", "show", "dev", "br0"]))
            .ok()?;
        said.contains("router ports on br0").then_some(())
    })
}
