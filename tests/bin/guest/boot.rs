//! Work of an init: file systems, modules, network interfaces, the control channel.

use std::{
    fs::{self, File, OpenOptions},
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use lab::guest::{image::MODULE_LIST, sys, wire::PORT_NAME};
use nix::mount::{MsFlags, mount};

/// Time limit for devices to appear after their drivers were loaded.
const DEVICE_DEADLINE: Duration = Duration::from_secs(20);

/// Time limit for the links to become usable for IPv6.
const LINK_DEADLINE: Duration = Duration::from_secs(5);

/// Sysctls of the guest. Duplicate address detection would keep the addresses unusable for a
/// second, and a thousand joins need more option memory than the default. The UDP memory, in pages,
/// lets a receiver without processor time for a while catch up without loss.
const SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    ("net/core/optmem_max", "4194304"),
    ("net/core/rmem_max", "67108864"),
    ("net/ipv4/udp_mem", "8192 12288 16384"),
    ("net/ipv6/mld_max_msf", "1024"),
];

/// Sets the machine up and opens the control channel.
pub(crate) fn boot() -> Result<File> {
    for (kind, target) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("bpf", "/sys/fs/bpf"),
    ] {
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("Cannot mount {target}"))?;
    }
    let list = fs::read_to_string(MODULE_LIST).context("Cannot read the list of modules")?;
    for name in list.lines() {
        let file = File::open(format!("/lib/modules/{name}"))?;
        sys::load_module(&file).with_context(|| format!("Cannot load {name}"))?;
    }
    for (name, value) in SYSCTLS {
        fs::write(format!("/proc/sys/{name}"), value)
            .with_context(|| format!("Cannot set {name}"))?;
    }
    let eth0 = wait_for(DEVICE_DEADLINE, || is_interface("eth0").then_some(()));
    ensure!(eth0.is_some(), "There is no eth0");
    // The driver binds all NICs in one go, so the second NIC, if any, exists by now.
    for interface in ["lo", "eth0", "eth1"] {
        if is_interface(interface) {
            let status = Command::new("/bin/ip")
                .args(["link", "set", interface, "up"])
                .status();
            ensure!(
                status.is_ok_and(|status| status.success()),
                "Cannot bring {interface} up"
            );
        }
    }
    // Before the link-local address exists, there is no multicast route either, and the kernel
    // drops arriving packets. A NIC without carrier never gets the address, which must not stop the
    // boot.
    let is_usable = |interface| !is_interface(interface) || has_address(interface);
    let _ = wait_for(LINK_DEADLINE, || {
        ["eth0", "eth1"].into_iter().all(is_usable).then_some(())
    });
    let port = wait_for(DEVICE_DEADLINE, find_port)
        .with_context(|| format!("No virtio-serial port named {PORT_NAME} appeared"))?;
    let Ok(file) = OpenOptions::new().read(true).write(true).open(&port) else {
        bail!("Cannot open the control channel {}", port.display());
    };
    println!("guest: ready");
    Ok(file)
}

/// Turns the machine off. Returns only if the kernel refuses.
pub(crate) fn power_off() {
    let _ = Command::new("/bin/poweroff").arg("-f").status();
}

fn is_interface(name: &str) -> bool {
    PathBuf::from("/sys/class/net").join(name).exists()
}

/// Returns true if an interface has an IPv6 address. The last column of the table is the
/// interface's name.
fn has_address(interface: &str) -> bool {
    let table = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    table
        .lines()
        .any(|line| line.split_whitespace().next_back() == Some(interface))
}

fn find_port() -> Option<PathBuf> {
    let entries = fs::read_dir("/sys/class/virtio-ports").ok()?;
    entries.flatten().find_map(|entry| {
        let name = fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim() == PORT_NAME).then(|| PathBuf::from("/dev").join(entry.file_name()))
    })
}

fn wait_for<T>(limit: Duration, condition: impl Fn() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        let found = condition();
        if found.is_some() || Instant::now() > deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
