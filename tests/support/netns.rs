//! Network namespaces for the tests, and guests in them.
//!
//! ```text
//!   host namespace             guest namespace (one for each VM)
//!   br0 --- vnet0 (TAP) <-- pump --> eth0 (TAP), real kernel listeners
//!    '----- up0 (veth) --------- eth0 of a peer namespace (where one is made)
//! ```

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

/// Timeout for a condition to become true.
pub const DEADLINE: Duration = Duration::from_secs(20);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Returns true if the test may make namespaces; prints the reason otherwise. Fails in CI, where it
/// must be possible.
pub fn privileged() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "network tests need root"
        );
        println!("skipped: needs root");
    }
    root
}

/// A network namespace, removed on drop.
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes a namespace whose name ends with `tag`.
    pub fn new(tag: &str) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("rc-{}-{number}-{tag}", std::process::id());
        command("ip", &["netns", "add", &name]);
        let namespace = Self { name };
        namespace.run(|| {
            // Skip duplicate address detection, which takes seconds, so that addresses are usable
            // at once.
            for scope in ["default", "all"] {
                let path = format!("/proc/sys/net/ipv6/conf/{scope}/accept_dad");
                fs::write(path, "0").expect("accept_dad");
            }
        });
        namespace.ip("link set lo up");
        namespace
    }

    /// Returns the name by which `ip netns` knows the namespace.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` in the namespace; spaces separate the arguments.
    pub fn ip(&self, arguments: &str) {
        self.within("ip", arguments);
    }

    /// Runs `tc` in the namespace.
    pub fn tc(&self, arguments: &str) {
        self.within("tc", arguments);
    }

    /// Runs `bridge` in the namespace and returns its output.
    pub fn bridge(&self, arguments: &str) -> String {
        self.within("bridge", arguments)
    }

    /// Runs a program of iproute2.
    fn within(&self, program: &str, arguments: &str) -> String {
        let mut all = vec!["-n", &self.name];
        all.extend(arguments.split(' '));
        command(program, &all)
    }

    /// Runs a closure on a thread in this namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter();
                    work()
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a closure on a thread in this namespace with a separate BPF file system, whose path the
    /// closure gets. The file system disappears when the closure returns.
    pub fn run_with_bpffs<T: Send>(&self, work: impl FnOnce(&Path) -> T + Send) -> T {
        let directory = tempfile::tempdir().expect("temporary directory");
        self.run(|| {
            unshare(CloneFlags::CLONE_NEWNS).expect("own mount namespace");
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private mounts");
            let path = directory.path();
            mount(
                Some("bpf"),
                path,
                Some("bpf"),
                MsFlags::empty(),
                None::<&str>,
            )
            .expect("BPF file system");
            work(path)
        })
    }

    /// Returns the index of an interface by name.
    pub fn ifindex(&self, interface: &str) -> u32 {
        self.run(|| nix::net::if_::if_nametoindex(interface))
            .unwrap_or_else(|error| panic!("{interface}: {error}"))
    }

    fn enter(&self) {
        let file = File::open(format!("/run/netns/{}", self.name)).expect("namespace");
        setns(file, CloneFlags::CLONE_NEWNET).expect("setns");
    }

    /// Makes a bridge that snoops MLDv2, with a link-local and a global address.
    pub fn add_bridge(&self, name: &str) {
        self.ip(&format!(
            "link add {name} type bridge mcast_snooping 1 mcast_mld_version 2 mcast_querier 0"
        ));
        self.ip(&format!("link set {name} up"));
        self.ip(&format!("addr add 2001:db8:1::10/64 dev {name} nodad"));
    }

    /// Connects two namespaces by a veth pair; this end becomes a port of `bridge`.
    pub fn add_peer(&self, bridge: &str, port: &str, peer: &Self, peer_interface: &str) {
        self.ip(&format!(
            "link add {port} type veth peer name {peer_interface} netns {}",
            peer.name
        ));
        self.ip(&format!("link set {port} master {bridge} up"));
        peer.ip(&format!("link set {peer_interface} up"));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .output();
    }
}

/// Runs a command that must succeed. Returns its output.
pub fn command(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(
        output.status.success(),
        "{program} {}: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until a condition returns a value.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = lab::wait::end_after(DEADLINE);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "timed out: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}
