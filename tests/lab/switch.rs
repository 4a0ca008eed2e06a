//! An access switch's multicast database.

use std::net::Ipv6Addr;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::node::Node;

/// What `bridge -j mdb show` prints of a bridge.
#[derive(Deserialize)]
struct Database {
    #[serde(default)]
    mdb: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    port: String,
    grp: String,
    src: Option<String>,
}

/// Removes every entry of some multicast addresses.
pub(crate) fn forget(switch: &Node, addresses: &[Ipv6Addr]) -> Result<()> {
    let mut show = switch.command("bridge");
    let said = switch.output(show.args(["-j", "mdb", "show", "dev", "br0"]))?;
    let databases: Vec<Database> =
        serde_json::from_str(&said).with_context(|| format!("Odd answer of bridge: {said}"))?;
    let entries = databases.iter().flat_map(|database| &database.mdb);
    for entry in entries.filter(|entry| is_of(entry, addresses)) {
        let mut remove = switch.command("bridge");
        remove.args(["mdb", "del", "dev", "br0", "port", &entry.port]);
        remove.args(["grp", &entry.grp]);
        if let Some(source) = &entry.src {
            remove.args(["src", source]);
        }
        // Removing one entry of an address may take others along.
        if let Err(error) = switch.output(&mut remove)
            && !format!("{error:#}").contains("No such file")
            && !format!("{error:#}").contains("Invalid argument")
        {
            return Err(error);
        }
    }
    Ok(())
}

fn is_of(entry: &Entry, addresses: &[Ipv6Addr]) -> bool {
    let address = entry.grp.parse();
    address.is_ok_and(|address| addresses.contains(&address))
}
