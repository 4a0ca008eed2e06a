//! `cargo xtask lab`: builds, shows and removes the lab by hand.

use std::io::{IsTerminal, stdin};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Subcommand, ValueEnum};
use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use lab::mroute::control::Status;
use lab::registry::{self, LabProcess};
use lab::{Lab, LabConfig, Site, netns};
use serde::Serialize;

use crate::run::build;
use crate::setup;

/// Verbs of `cargo xtask lab`.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Build the lab and leave it running; a lab of the same name is replaced
    Up {
        /// Multicast in the network of site 2, the destination
        #[arg(long, value_enum, default_value_t = Kind::Multicast)]
        site: Kind,
        /// Time that the tree of a late site needs to grow, milliseconds
        #[arg(long, value_name = "MS", default_value_t = 1000)]
        late_ms: u64,
        /// Interval of the switches' MLD General Queries, seconds
        #[arg(long, value_name = "S", default_value_t = 125, value_parser = clap::value_parser!(u64).range(1..=3600))]
        query_interval: u64,
        /// Number of relay nodes; they have a site of their own
        #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=2))]
        relays: u64,
        /// Add the hosts ims1, for a mapping server, and peer1, for a correspondent of mobile
        /// guests
        #[arg(long)]
        mobility: bool,
        #[command(flatten)]
        name: Name,
    },
    /// Remove the lab
    Down {
        /// Remove all labs on this machine
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        name: Name,
    },
    /// Open a shell on a node, or run a command there
    Shell {
        /// sender, router, switch1, switch2, vms1, vms2, relay1, relay2, ims1, peer1 or switch3
        node: String,
        /// Command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
        #[command(flatten)]
        name: Name,
    },
    /// Show nodes, processes, addresses and the multicast tree
    Status {
        /// Print JSON instead of tables
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        name: Name,
    },
    /// Change the multicast of a site of the running lab
    Site {
        /// Number of the site
        #[arg(value_parser = clap::value_parser!(u64).range(1..=2))]
        number: u64,
        /// New kind of the site
        kind: Kind,
        /// Time that the tree of a late site needs to grow, milliseconds
        #[arg(long, value_name = "MS", default_value_t = 1000)]
        late_ms: u64,
        #[command(flatten)]
        name: Name,
    },
}

/// Name of a lab.
#[derive(Debug, clap::Args)]
pub(crate) struct Name {
    /// Name of the lab: at most 16 letters a-z and digits
    #[arg(long = "lab", value_name = "NAME", default_value = "lab")]
    name: String,
}

/// Multicast in a site's network.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Kind {
    /// The tree reaches the site at once
    Multicast,
    /// The tree needs time to grow
    Late,
    /// The site gets no multicast
    UnicastOnly,
}

impl Kind {
    /// Returns the site, with the delay for a late one.
    pub(crate) fn site(self, late_ms: u64) -> Site {
        match self {
            Self::Multicast => Site::Multicast,
            Self::Late => Site::Late(late_ms),
            Self::UnicastOnly => Site::UnicastOnly,
        }
    }
}

/// Runs a verb.
pub(crate) fn run(verb: Verb) -> Result<()> {
    match verb {
        Verb::Up {
            site,
            late_ms,
            query_interval,
            relays,
            mobility,
            name,
        } => {
            setup::ensure()?;
            build()?;
            let query_interval = Duration::from_secs(query_interval);
            let sites = [Site::Multicast, site.site(late_ms)];
            up(LabConfig {
                sites,
                query_interval,
                relays: usize::try_from(relays).unwrap_or_default(),
                mobility,
                ..LabConfig::new(&name.name)
            })
        }
        Verb::Down { all, name } => down(all, &name.name),
        Verb::Shell {
            node,
            command,
            name,
        } => shell(&name.name, &node, &command),
        Verb::Status { json, name } => status(&name.name, json),
        Verb::Site {
            number,
            kind,
            late_ms,
            name,
        } => {
            let kind = kind.site(late_ms);
            Lab::attach(&name.name)?
                .router()
                .set_site(usize::try_from(number)?, kind)?;
            println!("Site {number} is now {kind}.");
            Ok(())
        }
    }
}

fn up(config: LabConfig) -> Result<()> {
    let started = Instant::now();
    let name = config.name.clone();
    if registry::read(&name).is_ok_and(|record| record.kept) {
        println!("Replacing the lab {name} that runs.");
    }
    let lab = Lab::up(config)?;
    let [first, second] = lab.config().sites;
    lab.keep()?;
    println!(
        "The lab {name} is up ({:.1?}): site 1 {first}, site 2 {second}.\n\
         Next: cargo xtask lab status, cargo xtask lab shell vms1, cargo xtask lab down",
        started.elapsed()
    );
    Ok(())
}

fn down(all: bool, name: &str) -> Result<()> {
    let names = if all {
        registry::names()
    } else {
        vec![name.to_owned()]
    };
    for name in &names {
        let existed = registry::names().contains(name) || !netns::list(&prefix(name)).is_empty();
        registry::down(name)?;
        if existed {
            println!("The lab {name} is removed.");
        } else {
            println!("There is no lab {name}.");
        }
    }
    if names.is_empty() {
        println!("There is no lab.");
    }
    Ok(())
}

fn prefix(name: &str) -> String {
    lab::node::prefix(name)
}

fn shell(name: &str, node: &str, command: &[String]) -> Result<()> {
    let node = Lab::attach(name)?.node(node)?;
    let mut inside = match command {
        [] => {
            ensure!(
                stdin().is_terminal(),
                "Not a terminal: give a command after the node's name"
            );
            let mut shell = node.command("bash");
            shell
                .env("PS1", format!("[{} \\w]# ", node.name()))
                .arg("--norc");
            shell
        }
        [program, arguments @ ..] => {
            let mut inside = node.command(program);
            inside.args(arguments);
            inside
        }
    };
    let status = inside
        .status()
        .context("Failed to run nsenter: install util-linux")?;
    // The exit code of the command is the result; the exit code of a shell means nothing.
    if !status.success() && !command.is_empty() {
        std::process::exit(status.code().unwrap_or(1));
    }
    Ok(())
}

/// Output of `cargo xtask lab status --json`.
#[derive(Debug, Serialize)]
struct LabStatus {
    name: String,
    nodes: Vec<NodeStatus>,
    processes: Vec<LabProcess>,
    multicast: Status,
}

#[derive(Debug, Serialize)]
struct NodeStatus {
    name: String,
    namespace: String,
    addresses: Vec<String>,
}

fn status(name: &str, json: bool) -> Result<()> {
    let lab = Lab::attach(name)?;
    let mut nodes = Vec::new();
    for node in lab.config().nodes() {
        let node = lab.node(&node)?;
        let mut ip = node.command("ip");
        let said = node.output(ip.args(["-o", "-6", "addr", "show", "scope", "global"]))?;
        let addresses = said
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace().skip(1);
                let interface = words.next()?;
                let address = words.nth(1)?;
                Some(format!("{address} on {interface}"))
            })
            .collect();
        nodes.push(NodeStatus {
            name: node.name().to_owned(),
            namespace: node.namespace().to_owned(),
            addresses,
        });
    }
    let status = LabStatus {
        name: name.to_owned(),
        nodes,
        processes: registry::processes(name),
        multicast: lab.router().status()?,
    };
    if json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print_tables(&status);
    }
    Ok(())
}

fn print_tables(status: &LabStatus) {
    let mut nodes = table(&["node", "addresses", "processes"]);
    for node in &status.nodes {
        let processes = status
            .processes
            .iter()
            .filter(|found| found.namespace == node.namespace);
        let processes: Vec<String> = processes
            .map(|found| {
                let program = found.command.split(' ').next().unwrap_or_default();
                let program = program.rsplit('/').next().unwrap_or_default();
                format!("{program} ({})", found.pid)
            })
            .collect();
        nodes.add_row([
            node.name.clone(),
            node.addresses.join("\n"),
            processes.join("\n"),
        ]);
    }
    println!("{nodes}");
    let mut sites = table(&["site", "multicast", "listening", "grown"]);
    for site in &status.multicast.sites {
        sites.add_row([
            site.site.to_string(),
            site.kind.to_string(),
            some(&site.listening),
            some(&site.grown),
        ]);
    }
    println!("{sites}");
    if !status.multicast.flows.is_empty() {
        let mut flows = table(&["source", "multicast address", "to sites"]);
        for flow in status.multicast.flows.iter().take(SHOWN_MAX) {
            let to: Vec<String> = flow.sites.iter().map(ToString::to_string).collect();
            flows.add_row([
                flow.flow.source.to_string(),
                flow.flow.multicast_address.to_string(),
                to.join(", "),
            ]);
        }
        println!("{flows}");
    }
}

/// Limit of addresses or flows in a table; JSON has all of them.
const SHOWN_MAX: usize = 10;

fn some(addresses: &[std::net::Ipv6Addr]) -> String {
    let mut lines: Vec<String> = addresses
        .iter()
        .take(SHOWN_MAX)
        .map(ToString::to_string)
        .collect();
    if addresses.len() > SHOWN_MAX {
        lines.push(format!("and {} more", addresses.len() - SHOWN_MAX));
    }
    lines.join("\n")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_FULL_CONDENSED).set_header(header);
    table
}
