//! An access switch: its ports and its multicast database.

use std::net::Ipv6Addr;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::node::Node;
use crate::wait;

/// Time limit for ports to forward after they are up.
const FORWARDING: Duration = Duration::from_secs(10);

/// A port in the output of `bridge -j link show`.
#[derive(Deserialize)]
struct Port {
    state: String,
}

/// Waits until `ports` ports forward. A port forwards only after the kernel has noticed its
/// carrier, which takes up to a second; earlier packets are lost.
pub(crate) fn wait_forwarding(switch: &Node, ports: usize) -> Result<()> {
    let what = format!("{ports} ports of {} to forward", switch.name());
    wait::until(&what, FORWARDING, || {
        let mut show = switch.command("bridge");
        let said = switch.output(show.args(["-j", "link", "show"])).ok()?;
        let known: Vec<Port> = serde_json::from_str(&said).ok()?;
        let forward = known.iter().filter(|port| port.state == "forwarding");
        (forward.count() == ports).then_some(())
    })
}

/// A bridge in the output of `bridge -j mdb show`.
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

/// Removes every entry of the given multicast addresses.
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
        // The removal of one entry of an address may remove other entries too.
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
