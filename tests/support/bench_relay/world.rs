//! Namespaces, links and addresses.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::net::Ipv6Addr;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use common::maps::{NO_BRIDGE, StreamKey};
use common::relay::{self, Endpoints};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// Mount point of the bench's private BPF file system.
pub(super) const BPF_FS: &str = "/sys/fs/bpf";

/// Source address of the stream.
pub(super) const SOURCE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 9);
/// Destination address of the stream.
pub(super) const MULTICAST_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0x1234, 1);
pub(super) const SOURCE_PORT: u16 = 5003;
pub(super) const DESTINATION_PORT: u16 = 5004;

/// Key of the stream in the maps.
pub(super) const STREAM: StreamKey = StreamKey {
    multicast_address: MULTICAST_ADDRESS.octets(),
    source: SOURCE.octets(),
    source_port: SOURCE_PORT,
    destination_port: DESTINATION_PORT,
    vlan: 0,
    bridge: NO_BRIDGE,
};

/// Returns the endpoints of the relayed stream between two hosts, with ports that keep the UDP
/// checksum.
pub(super) fn endpoints(relay_address: Ipv6Addr, agent_address: Ipv6Addr) -> Result<Endpoints> {
    let (relay_address, agent_address) = (relay_address.octets(), agent_address.octets());
    let (relay_port, agent_port) = relay::port_pairs(&STREAM, &relay_address, &agent_address)
        .next()
        .context("No pair of ports keeps the checksum")?;
    Ok(Endpoints {
        relay_address,
        relay_port,
        agent_address,
        agent_port,
    })
}

/// Moves the calling thread, and the threads that it starts, to new network and mount namespaces
/// with a BPF file system.
pub(super) fn enter() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .context("Failed to make namespaces: run as root")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>)
        .context("Failed to make mounts private")?;
    mount(
        Some("bpf"),
        BPF_FS,
        Some("bpf"),
        MsFlags::empty(),
        None::<&str>,
    )
    .context("Failed to mount a BPF file system")?;
    prepare()
}

/// An unnamed network namespace; disappears with the last reference.
pub(super) struct Namespace(File);

impl Namespace {
    /// Creates a namespace.
    pub(super) fn new() -> Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("Failed to make a namespace")?;
            prepare()?;
            Ok(Self(
                File::open("/proc/thread-self/ns/net").context("Failed to open a namespace")?,
            ))
        })
    }

    /// Runs a closure on a thread inside the namespace.
    pub(super) fn within<T: Send>(&self, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET).context("Failed to enter a namespace")?;
            action()
        })
    }

    /// Returns the path that names the namespace for `ip`.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }
}

fn on_thread<T: Send>(action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(action)
            .join()
            .map_err(|_| anyhow!("A thread of the bench panicked"))?
    })
}

/// Disables DAD, so that addresses are usable at once, and sets the loopback up.
fn prepare() -> Result<()> {
    for setting in ["all/accept_dad", "default/accept_dad"] {
        sysctl(setting, "0")?;
    }
    ip("link set lo up\n")
}

/// Sets an IPv6 sysctl, relative to `net/ipv6/conf`, in the calling thread's namespace.
pub(super) fn sysctl(setting: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/ipv6/conf/{setting}");
    fs::write(&path, value).with_context(|| format!("Failed to write {path}"))
}

/// Stops the bridges of the calling thread's namespace from passing frames to netfilter, as on
/// hosts without `br_netfilter`.
pub(super) fn no_bridge_netfilter() -> Result<()> {
    let path = "/proc/sys/net/bridge/bridge-nf-call-ip6tables";
    match fs::write(path, "0") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Failed to write {path}"))
        }
        _ => Ok(()),
    }
}

/// Runs `ip` commands, one per line, in the calling thread's namespace.
pub(super) fn ip(batch: &str) -> Result<()> {
    with_input("ip", ["-batch", "-"], batch)
}

/// Runs `bridge` commands, one per line, in the calling thread's namespace.
pub(super) fn bridge(batch: &str) -> Result<()> {
    with_input("bridge", ["-batch", "-"], batch)
}

/// Runs a command with `input` as its standard input, in the calling thread's namespace.
pub(super) fn with_input<S: AsRef<OsStr>>(
    program: &str,
    arguments: impl IntoIterator<Item = S>,
    input: &str,
) -> Result<()> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("Failed to start {program}: run `cargo xtask setup`"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin
            .write_all(input.as_bytes())
            .with_context(|| format!("Failed to write to {program}"))?;
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("Failed to wait for {program}"))?;
    ensure!(
        output.status.success(),
        "{program} failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// Connects the calling thread's namespace to another one by a veth pair. The peer completes
/// checksums in software, so its packets arrive with full checksums, as from a wire.
pub(super) fn link(interface: &str, peer: &Namespace, peer_interface: &str) -> Result<()> {
    ip(&format!(
        "link add {interface} type veth peer name {peer_interface} netns {}\n\
         link set {interface} up\n",
        peer.path().display()
    ))?;
    peer.within(|| {
        ip(&format!("link set {peer_interface} up\n"))?;
        with_input("ethtool", ["-K", peer_interface, "tx", "off"], "")
    })
}

/// Returns the MAC address of an interface in the calling thread's namespace.
pub(super) fn mac(interface: &str) -> Result<String> {
    let addresses = nix::ifaddrs::getifaddrs().context("Failed to list interfaces")?;
    addresses
        .filter(|it| it.interface_name == interface)
        .find_map(|it| {
            let bytes = it.address?.as_link_addr()?.addr()?;
            Some(bytes.map(|byte| format!("{byte:02x}")).join(":"))
        })
        .with_context(|| format!("Interface {interface} has no MAC address"))
}
