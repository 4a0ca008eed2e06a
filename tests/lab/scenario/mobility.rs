//! Unicast mobility: the mapping server, a correspondent, and the guest's node.
//!
//! ```text
//!  ims1: roamcast ims      peer1: migkick node       guest: migkick node
//!        ^   ^----- updates, lookups ----'                     |
//!        '---------------- updates, lookups -------------------'
//! ```
//!
//! After their first exchange the two nodes know each other: see [`sessions`](super::sessions).

use std::fs;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::guest::control::Control;
use crate::guest::domain::SOCKET_DIRECTORY;
use crate::guest::program::Running;
use crate::host::Host;
use crate::node::Process;
use crate::{Lab, binaries, wait};

/// Permanent address (HoA) of the guest.
pub const GUEST_HOA: Ipv6Addr = Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 0, 0, 0x1);
/// Permanent address (HoA) of the correspondent.
pub const PEER_HOA: Ipv6Addr = Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 0, 0, 0x2);
/// Prefix of all permanent addresses.
const HOME: &str = "fd5e:6d61:74::/48";
/// Port of the mapping server.
const PORT: u16 = common::mat::IMS_PORT;
/// First address of the guest, set by hand because the lab sends no Router Advertisements.
const GUEST_ADDRESS: &str = "2001:db8:1::a0/64";
/// The router's addresses in the networks of both VM hosts.
const ROUTERS: [&str; 2] = ["2001:db8:1::1", "2001:db8:2::1"];
/// Longest time until a program answers, and until a node is registered.
const START: Duration = Duration::from_secs(20);
/// Deadline of a command in the guest.
const COMMAND: Duration = Duration::from_secs(20);

/// The running mapping server and correspondent, and the guest's key.
pub struct Mobility {
    ims: Process,
    /// Process of the correspondent's node; ends with this value.
    _peer: Process,
    lab: Lab,
    /// Output of `roamcast ims enroll` for the guest: the first part of its `node.toml`.
    guest_key: String,
}

/// `migkick node` in a guest.
pub struct GuestNode {
    control: Control,
    /// Process of `migkick node`, whose stderr is the log.
    running: Running,
}

impl Mobility {
    /// Starts the mapping server and the correspondent's node.
    ///
    /// # Errors
    ///
    /// When a program is not built or does not become ready; the text holds the program's output.
    pub fn start(lab: &Lab) -> Result<Self> {
        let ims = lab.ims()?;
        let server = format!("[{}]:{PORT}", ims.address());
        let text = format!(
            "[ims]\nhome = \"{HOME}\"\nservers = [\"{server}\"]\n\
             control_socket = \"{SOCKET_DIRECTORY}/ims.sock\"\n\
             secret = \"{SOCKET_DIRECTORY}/ims.secret\"\n\
             store = \"{SOCKET_DIRECTORY}/ims.redb\"\n"
        );
        write(&ims.shared_directory().join("ims.toml"), &text)?;
        ims.output(&mut roamcast(ims, &["ims", "init"])?)?;
        let keys = [GUEST_HOA, PEER_HOA].map(|hoa| -> Result<String> {
            ims.output(&mut roamcast(ims, &["ims", "enroll", &hoa.to_string()])?)
        });
        let [guest_key, peer_key] = keys;
        let process = launch_ims(ims)?;
        Ok(Self {
            ims: process,
            _peer: launch_peer(lab.peer()?, &peer_key?)?,
            lab: Lab::attach(&lab.config().name)?,
            guest_key: guest_key?,
        })
    }

    /// Kills the mapping server (SIGKILL), as a crash would.
    pub fn kill_ims(&mut self) {
        self.ims.kill();
    }

    /// Starts the mapping server again after [`Mobility::kill_ims`] and waits until it answers.
    ///
    /// # Errors
    ///
    /// When the mapping server does not become ready.
    pub fn restart_ims(&mut self) -> Result<()> {
        self.ims = launch_ims(self.lab.ims()?)?;
        Ok(())
    }

    /// Returns the output of `migkick node status --json` on the correspondent's host.
    ///
    /// # Errors
    ///
    /// When the node does not answer.
    pub fn peer_status(&self) -> Result<Value> {
        peer_status(self.lab.peer()?)
    }

    /// Gives the guest its first address and key, starts its node, and waits until it is registered.
    ///
    /// # Errors
    ///
    /// When a step fails.
    pub fn join(&self, guest: &Control) -> Result<GuestNode> {
        let [router, _] = ROUTERS;
        let routers = ROUTERS.map(|it| format!("\"{it}\"")).join(", ");
        let script = format!(
            "set -e\n\
             ip -6 addr add {GUEST_ADDRESS} dev eth0\n\
             ip -6 route add default via {router} dev eth0\n\
             mkdir -p /etc/migkick\n\
             umask 077\n\
             cat > /etc/migkick/node.toml <<'END'\n\
             {}routers = [{routers}]\nEND\n",
            self.guest_key
        );
        let arguments = ["-c", &script];
        guest.run("/bin/sh", &arguments, COMMAND)?.into_success()?;
        let running = guest.spawn("migkick", &["node"])?;
        let node = GuestNode {
            control: guest.clone(),
            running,
        };
        node.wait_registered()?;
        Ok(node)
    }
}

impl GuestNode {
    /// Returns the output of `migkick node status --json` in the guest.
    ///
    /// # Errors
    ///
    /// When the node does not answer.
    pub fn status(&self) -> Result<Value> {
        let output = self
            .control
            .run("migkick", &["node", "status", "--json"], COMMAND)?;
        let text = output.into_success()?.stdout();
        serde_json::from_str(&text).with_context(|| format!("The node printed no JSON: {text}"))
    }

    /// Waits until a mapping server knows the guest's address.
    ///
    /// # Errors
    ///
    /// When no mapping server knows the address in time; the text is the node's output.
    pub fn wait_registered(&self) -> Result<()> {
        let registered = || self.status().is_ok_and(|it| it["registered"] == true);
        wait::until("the guest's node to be registered", START, || {
            registered().then_some(())
        })
        .with_context(|| {
            let output = self.running.output();
            let status = self.status().unwrap_or_default();
            format!("{}{}\n{status}", output.stdout(), output.stderr())
        })
    }

    /// Returns the log of the node so far.
    pub fn log(&self) -> String {
        self.running.output().stderr()
    }
}

/// Returns a `roamcast` command with the mapping server's configuration.
fn roamcast(ims: &Host, arguments: &[&str]) -> Result<Command> {
    let mut command = ims.command(binaries::path("roamcast")?);
    command
        .args(arguments)
        .args(["--config", &format!("{SOCKET_DIRECTORY}/ims.toml")]);
    Ok(command)
}

fn launch_ims(ims: &Host) -> Result<Process> {
    let mut process = ims.spawn("ims", roamcast(ims, &["ims"])?)?;
    let socket = format!("{SOCKET_DIRECTORY}/ims.sock");
    let mut status = || -> Result<()> {
        let mut command = ims.command(binaries::path("roamcast")?);
        command.args(["status", "--json", "--socket", &socket]);
        ims.output(&mut command).map(drop)
    };
    wait_up(&mut process, "the mapping server", &mut status)?;
    Ok(process)
}

fn launch_peer(peer: &Host, key: &str) -> Result<Process> {
    let path = peer.shared_directory().join("node.toml");
    let state = format!("state = \"{SOCKET_DIRECTORY}/node.json\"\n");
    write(&path, &format!("{key}{state}"))?;
    let mut command = peer.command(binaries::path("migkick")?);
    command.args(["node", "--config", &format!("{SOCKET_DIRECTORY}/node.toml")]);
    let mut process = peer.spawn("node", command)?;
    let mut registered = || {
        let status = peer_status(peer)?;
        ensure!(status["registered"] == true, "Not registered: {status}");
        Ok(())
    };
    wait_up(&mut process, "the correspondent's node", &mut registered)?;
    Ok(process)
}

fn peer_status(peer: &Host) -> Result<Value> {
    let mut command = peer.command(binaries::path("migkick")?);
    let text = peer.output(command.args(["node", "status", "--json"]))?;
    serde_json::from_str(&text).with_context(|| format!("The node printed no JSON: {text}"))
}

/// Waits until `ready` succeeds. Fails at once if the program ends.
fn wait_up(process: &mut Process, what: &str, ready: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    let mut last = Ok(());
    let up = wait::until(what, START, || {
        if !matches!(process.try_wait(), Ok(None)) {
            return Some(false);
        }
        last = ready();
        last.is_ok().then_some(true)
    });
    let words = || format!("Last words of {what}: {}", process.printed().trim());
    match (up, last) {
        (Ok(true), _) => Ok(()),
        (_, Err(error)) => Err(error).with_context(words),
        (Err(error), _) => Err(error).with_context(words),
        (Ok(false), _) => anyhow::bail!("{what} ended at once. {}", words()),
    }
}

/// Writes a file that only its owner may read.
fn write(path: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let written = fs::write(path, text)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o600)));
    written.with_context(|| format!("Failed to write {}", path.display()))
}
