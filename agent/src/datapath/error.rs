//! Why an operation on the data path failed.

use std::io;
use std::path::PathBuf;

use common::maps::MAX_BRIDGES;
use linux::bpf::pins::PinError;

#[cfg(doc)]
use super::Program;
use crate::net::tc::TcRefusal;

/// Why an operation on the data path failed; a sentence for a person.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The pin root is not on a BPF file system.
    #[error(
        "{} is not on a BPF file system; run `mount -t bpf bpf /sys/fs/bpf` or correct pin_root",
        .0.display()
    )]
    NoBpfFs(PathBuf),
    /// Another running agent has locked the pins.
    #[error("Another agent uses the pins under {}; stop it or give this one another pin_root", .0.display())]
    InUse(PathBuf),
    /// Another user can add or replace pins in the directory.
    #[error(
        "Others can change what is in {0} (owner {owner}, mode {mode:o}), and so what the kernel programs do; remove it, or run `chown 0 {0}` and `chmod 700 {0}`",
        path.display()
    )]
    PinsOfOthers {
        /// Directory with the wrong owner or mode.
        path: PathBuf,
        /// User ID of its owner.
        owner: u32,
        /// Permission bits of the directory, as in `chmod`.
        mode: u32,
    },
    /// A pin cannot be created, read or removed.
    #[error("Cannot use the pin {}: {error}; run the agent as root", path.display())]
    Pin {
        /// Path of the pin.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        error: io::Error,
    },
    /// The kernel lacks a feature that every set of programs requires.
    #[error("This kernel has no {feature}; use one that has, as Linux {version} and newer")]
    KernelLacks {
        /// Name of the missing feature.
        feature: &'static str,
        /// First kernel version with the feature.
        version: &'static str,
    },
    /// The configuration requires TCX, and the kernel has none.
    #[error("This kernel has no TCX; let the agent choose the hook, and it uses filters of qdiscs")]
    NoTcx,
    /// A netlink request for qdiscs or filters failed.
    #[error("Cannot read or change qdiscs and filters by netlink: {0}; run the agent as root")]
    TrafficControl(#[source] io::Error),
    /// The kernel refused the programs or maps; the text is the end of the verifier's log.
    #[error(
        "Cannot load the kernel programs: {0}; the agent needs root or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
    )]
    Load(String),
    /// A map or program is missing, or has another layout.
    #[error("Map or program {name} is not of this version's layout; remove the pins and restart")]
    Layout {
        /// Name of the map or program in the object file.
        name: &'static str,
    },
    /// The configured size of a ring buffer is not possible.
    #[error("Capacity {bytes} of {name} is not a power of two of at least {least}; correct it")]
    RingCapacity {
        /// Key of the size in the configuration.
        name: &'static str,
        /// Configured size.
        bytes: u32,
        /// Smallest size possible.
        least: u32,
    },
    /// The configured number of record slots is not possible.
    #[error("Capacity {slots} of record_slots is not between 1 and {most}; correct it")]
    RecordSlots {
        /// Configured number of slots.
        slots: u32,
        /// Largest number possible.
        most: u32,
    },
    /// The numbers of all bridges are taken.
    #[error("All {MAX_BRIDGES} numbers of bridges are taken; remove the pins and restart")]
    NoBridgeNumber,
    /// Every record slot belongs to a VM that migrates away.
    #[error(
        "No free slot to record the frames of port {ifindex}: {slots} VMs are being moved away; \
         wait until one has moved, or raise record_slots in the config"
    )]
    NoRecordSlot {
        /// ifindex of the TAP that needs a slot.
        ifindex: u32,
        /// Number of slots in total.
        slots: u32,
    },
    /// A map operation failed, for instance because the map is full.
    #[error("Map {name}: {error}; if it is full, raise its capacity in the config")]
    Map {
        /// Name of the map in the object file.
        name: &'static str,
        /// Error of `bpf(2)`.
        #[source]
        error: io::Error,
    },
    /// A program cannot be attached.
    #[error("Cannot attach {program} to {interface} (ifindex {ifindex}): {reason}")]
    Attach {
        /// Name of the program in the kernel, see [`Program::name`].
        program: &'static str,
        /// Name of the interface.
        interface: String,
        /// Index of the interface.
        ifindex: u32,
        /// Refusal of the kernel, or the reason found by the agent.
        reason: String,
    },
    /// A sysctl cannot be changed.
    #[error("Cannot set net.ipv6.conf.lo.forwarding: {0}; programs need it to look up routes")]
    Forwarding(#[source] io::Error),
    /// The configured hook of the programs on TAPs is not a TC hook.
    #[error("Programs cannot be attached by {0} here; use tcx or filter")]
    NotTc(&'static str),
    /// The port has no limits because its programs are not attached.
    #[error("Port {0} is not attached; attach it first")]
    NoPort(u32),
    /// Another reader has already taken the ring buffer `HELD`.
    #[error("The held frames are read already; only one reader can have them")]
    HeldTaken,
    /// The ring buffer `EVENTS` cannot be watched, or another reader has it.
    #[error("Cannot watch the events of the kernel programs: {0}")]
    Events(#[source] io::Error),
    /// The traced programs are already attached.
    #[error("The kernel programs are traced already; one reader serves all tracers")]
    TracedAlready,
    /// The runtime shut down before the work ended.
    #[error("The agent is shutting down")]
    Shutdown,
}

impl From<PinError> for DatapathError {
    fn from(error: PinError) -> Self {
        match error {
            PinError::InUse(root) => Self::InUse(root),
            PinError::OfOthers { path, owner, mode } => Self::PinsOfOthers { path, owner, mode },
            PinError::Pin { path, error } => Self::Pin { path, error },
        }
    }
}

impl DatapathError {
    pub(super) fn from_refusal(refusal: TcRefusal) -> Self {
        let text = refusal.to_string();
        Self::TrafficControl(io::Error::new(refusal.error.kind(), text))
    }
}
