//! The host machine: a stock Debian kernel in an emulated machine that runs one command.
//!
//! ```text
//!  outside                                         machine (QEMU, TCG)
//!  Machine::run --- virtio-serial port ----------- `machine-init` (PID 1)
//!    |   the job, what is typed  -------------------->    | loads modules, runs the command
//!    |   <------------- output, errors, exit code         |
//!    |   <------------- serial console                    | the kernel's own words
//!    /   --- 9p, read-only ------------------------------ / under an overlay in memory
//!    DIR --- 9p, writable ------------------------------- /machine-output
//! ```
//!
//! TCG emulates a processor with AMD's virtualization, so KVM and vhost-net work in the machine.
//! Everything in the machine is 10 to 15 times slower than outside. Programs installed and built
//! outside are visible in the machine. The machine discards written files at the end, except those
//! in `/machine-output`.
//!
//! - `image` has the kernel and the initramfs, whose first process is `init.sh`.
//! - [`run`](mod@run) starts QEMU and follows it to its end.
//! - [`wire`] defines the messages of both sides.
//!
//! The machine's side is the binary `machine-init` in `tests/bin`.

mod image;
mod qemu;
pub mod run;
pub mod wire;

use std::path::PathBuf;
use std::time::Duration;

/// Environment variable that is 1 inside the machine. Programs there do not install or build
/// anything, because everything is prebuilt outside.
pub const VARIABLE: &str = "ROAMCAST_MACHINE";

/// Factor by which time limits grow inside the machine.
pub(crate) const SLOWNESS: u32 = 10;

/// Environment variable that names the writable directory to the command.
pub const OUTPUT_VARIABLE: &str = "ROAMCAST_MACHINE_OUTPUT";

/// Path of the writable directory inside the machine.
const OUTPUT: &str = "/machine-output";

/// Tag of the writable directory's 9p share.
pub const OUTPUT_TAG: &str = "output";

/// Tag of the outer file system's 9p share; `init.sh` mounts the share by the same tag.
const OUTER_TAG: &str = "outer";

/// Modules that a host has or that its administrator's tools load: KVM, modules for libvirt's NICs
/// and their bandwidth, and the hooks to which tests attach programs.
const MODULES: &[&str] = &[
    "kvm_amd",
    "vhost_net",
    "tun",
    "bridge",
    "veth",
    "8021q",
    "dummy",
    "br_netfilter",
    "cls_bpf",
    "cls_u32",
    "cls_fw",
    "act_police",
    "sch_ingress",
    "sch_htb",
    "sch_prio",
    "sch_fq_codel",
    "sch_netem",
];

/// Environment variables that the machine inherits, in addition to those with one of
/// [`PASSED_PREFIXES`]. Other variables name sockets and directories that do not exist in the
/// machine.
const PASSED: &[&str] = &[
    "CI", "HOME", "LANG", "LOGNAME", "PATH", "SHELL", "TERM", "USER",
];

const PASSED_PREFIXES: &[&str] = &["CARGO", "LC_", "RUST", "ROAMCAST_"];

/// Returns true in a program that runs inside the machine.
#[must_use]
pub fn inside() -> bool {
    std::env::var_os(VARIABLE).is_some_and(|value| value == "1")
}

/// Returns the environment of a command in the machine.
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .filter(|(name, _)| {
            PASSED.contains(&name.as_str())
                || PASSED_PREFIXES
                    .iter()
                    .any(|prefix| name.starts_with(prefix))
        })
        .collect()
}

/// A machine to boot.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Package of the kernel, its version, or the beginning of the version, such as `6.1`.
    pub kernel: String,
    /// Processors. With more than one, KVM in the machine is not reliable.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Time from the start of QEMU after which the machine is killed.
    pub timeout: Duration,
    /// Outside directory to which the command may write.
    pub output: Option<PathBuf>,
}

/// A command to run in a machine.
#[derive(Clone, Debug)]
pub struct Command {
    /// Program and arguments.
    pub words: Vec<String>,
    /// Working directory.
    pub directory: PathBuf,
    /// The environment, from [`environment`]; the machine adds its own variables.
    pub environment: Vec<(String, String)>,
    /// Rows and columns of the command's terminal, which carries both output and errors; `None` for
    /// no terminal.
    pub terminal: Option<(u16, u16)>,
}
