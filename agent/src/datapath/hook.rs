//! Names of hooks, programs and attachments.

use serde::Deserialize;

use crate::net::tc::{Parent, Side};

/// A hook that runs a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// TCX (kernel 6.6): any number of programs per interface, independent of qdiscs.
    Tcx,
    /// A `bpf` filter of a qdisc, for kernels without TCX.
    Filter,
    /// XDP in the driver, before a socket buffer exists.
    XdpNative,
    /// Generic XDP: after the driver, on socket buffers.
    XdpGeneric,
}

impl Hook {
    /// Returns the name shown to the operator.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Filter => "filter",
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
        }
    }
}

/// Configured hook for restoring relayed packets on uplinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UplinkHook {
    /// XDP in the driver; TC if the driver refuses.
    XdpNative,
    /// XDP after the driver. Slower than TC, and the restored checksums are wrong if the sender
    /// leaves checksums to the hardware, as `veth` and `virtio_net` do.
    XdpGeneric,
    /// TC ingress: correct on every interface.
    Tc,
}

/// The eBPF programs of the data path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// TAP ingress: snoops MLD and marks signalling datagrams.
    Snoop,
    /// TAP egress, towards the VM: counts delivered packets, and records or holds the frames of a
    /// handover.
    Gate,
    /// Uplink ingress: follows streams and Queries, and restores relayed packets.
    Uplink,
    /// Uplink egress: drops packets restored on this host.
    Leak,
    /// Ingress of a relay's interface: sends copies of streams to the subscribers.
    Replicate,
}

impl Program {
    /// All programs of the data path.
    pub const ALL: [Self; 5] = [
        Self::Snoop,
        Self::Gate,
        Self::Uplink,
        Self::Leak,
        Self::Replicate,
    ];

    /// Returns the name in the kernel. The XDP variant of `uplink` is named `uplink_xdp`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snoop => "snoop",
            Self::Gate => "gate",
            Self::Uplink => "uplink",
            Self::Leak => "leak",
            Self::Replicate => "replicate",
        }
    }

    /// Direction of traffic that the program sees.
    pub fn side(self) -> Side {
        match self {
            Self::Gate | Self::Leak => Side::Egress,
            Self::Snoop | Self::Uplink | Self::Replicate => Side::Ingress,
        }
    }

    /// Whether the program belongs on TAPs, whose qdiscs libvirt may change.
    pub fn is_for_taps(self) -> bool {
        matches!(self, Self::Snoop | Self::Gate)
    }
}

/// A program attached to an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Program that runs at the hook.
    pub program: Program,
    /// Index of the interface.
    pub ifindex: u32,
    /// Name of the interface at the time of the attachment.
    pub interface: String,
    /// Hook that runs the program.
    pub hook: Hook,
    /// Filter list that contains the program; `None` unless `hook` is [`Hook::Filter`].
    pub parent: Option<Parent>,
    /// Whether this agent adopted the attachment of an earlier agent.
    pub adopted: bool,
}
