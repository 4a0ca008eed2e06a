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
use common::maps::StreamKey;
use common::relay::{self, Endpoints};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// BPF file system of the bench alone.
pub const BPF_FS: &str = "/sys/fs/bpf";

/// Source of the stream.
pub const SOURCE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 9);
/// Where the stream goes to.
pub const MULTICAST_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0x1234, 1);
pub const SOURCE_PORT: u16 = 5003;
pub const DESTINATION_PORT: u16 = 5004;

/// The stream as a key.
pub const STREAM: StreamKey = StreamKey {
    multicast_address: MULTICAST_ADDRESS.octets(),
    source: SOURCE.octets(),
    source_port: SOURCE_PORT,
    destination_port: DESTINATION_PORT,
    vlan: 0,
    pad: 0,
};

/// The relayed form of the stream between two hosts.
pub fn endpoints(relay_address: Ipv6Addr, agent_address: Ipv6Addr) -> Result<Endpoints> {
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

/// Puts the calling thread, and those it starts, into a network and a mount namespace of their
/// own, with a BPF file system.
pub fn enter() -> Result<()> {
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

/// A network namespace without a name; gone when nothing refers to it.
pub struct Namespace(File);

impl Namespace {
    /// Makes one.
    pub fn new() -> Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("Failed to make a namespace")?;
            prepare()?;
            Ok(Self(
                File::open("/proc/thread-self/ns/net").context("Failed to open a namespace")?,
            ))
        })
    }

    /// Runs a closure on a thread in it.
    pub fn within<T: Send>(&self, action: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET).context("Failed to enter a namespace")?;
            action()
        })
    }

    /// Its name for `ip`.
    pub fn path(&self) -> PathBuf {
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

/// Addresses are usable at once, the loopback is up.
fn prepare() -> Result<()> {
    for setting in ["all/accept_dad", "default/accept_dad"] {
        sysctl(setting, "0")?;
    }
    ip("link set lo up\n")
}

/// Changes a setting of IPv6 in the namespace of the calling thread.
pub fn sysctl(setting: &str, value: &str) -> Result<()> {
    let path = format!("/proc/sys/net/ipv6/conf/{setting}");
    fs::write(&path, value).with_context(|| format!("Failed to write {path}"))
}

/// Lets bridges of the calling thread's namespace pass frames by netfilter no more, as on hosts
/// without `br_netfilter`.
pub fn no_bridge_netfilter() -> Result<()> {
    let path = "/proc/sys/net/bridge/bridge-nf-call-ip6tables";
    match fs::write(path, "0") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("Failed to write {path}"))
        }
        _ => Ok(()),
    }
}

/// Runs `ip` with commands, one a line, in the namespace of the calling thread.
pub fn ip(batch: &str) -> Result<()> {
    with_input("ip", ["-batch", "-"], batch)
}

/// Runs `bridge` likewise.
pub fn bridge(batch: &str) -> Result<()> {
    with_input("bridge", ["-batch", "-"], batch)
}

/// Runs a command that reads its input, in the namespace of the calling thread.
pub fn with_input<S: AsRef<OsStr>>(
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

/// Joins the calling thread's namespace with another by a pair of interfaces. Checksums are
/// finished by the other side, as those of packets from a wire are.
pub fn link(interface: &str, peer: &Namespace, peer_interface: &str) -> Result<()> {
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

/// MAC address of an interface in the calling thread's namespace.
pub fn mac(interface: &str) -> Result<String> {
    let addresses = nix::ifaddrs::getifaddrs().context("Failed to list interfaces")?;
    addresses
        .filter(|it| it.interface_name == interface)
        .find_map(|it| {
            let bytes = it.address?.as_link_addr()?.addr()?;
            Some(bytes.map(|byte| format!("{byte:02x}")).join(":"))
        })
        .with_context(|| format!("Interface {interface} has no MAC address"))
}
