//! Names of what is attached where.

use serde::Deserialize;

use crate::net::tc::{Parent, Side};

/// Where programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// TCX, which has room for any number of programs and is independent of qdiscs.
    Tcx,
    /// A filter of a qdisc, where the kernel has no TCX.
    Filter,
    /// XDP in the driver.
    XdpNative,
    /// XDP after the driver, on socket buffers.
    XdpGeneric,
}

impl Hook {
    /// Name for the operator.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Filter => "filter",
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
        }
    }
}

/// Where an operator wants relayed packets to be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UplinkHook {
    /// XDP in the driver; TC where the driver refuses.
    XdpNative,
    /// XDP after the driver. Costs more than TC, and restored checksums are wrong where the sender
    /// leaves them to the hardware, as `veth` and `virtio_net` do.
    XdpGeneric,
    /// TC ingress: right everywhere.
    Tc,
}

/// The kernel programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// On a TAP: MLD snooping and the mark of signalling datagrams.
    Snoop,
    /// On a TAP's other way, into the VM: what is delivered, and the frames of a handover.
    Gate,
    /// On an uplink: streams, Queries, and relayed packets, which it restores.
    Uplink,
    /// On an uplink's way out: what was restored here does not leave.
    Leak,
    /// On a relay's interface: copies of streams for the subscribers.
    Replicate,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Snoop,
        Self::Gate,
        Self::Uplink,
        Self::Leak,
        Self::Replicate,
    ];

    /// Name in the kernel; that of `uplink` at XDP is `uplink_xdp`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snoop => "snoop",
            Self::Gate => "gate",
            Self::Uplink => "uplink",
            Self::Leak => "leak",
            Self::Replicate => "replicate",
        }
    }

    /// The side of its interface that it is attached to.
    pub fn side(self) -> Side {
        match self {
            Self::Gate | Self::Leak => Side::Egress,
            Self::Snoop | Self::Uplink | Self::Replicate => Side::Ingress,
        }
    }

    /// Whether it is attached to TAPs, whose qdiscs are libvirt's to change.
    pub fn is_for_taps(self) -> bool {
        matches!(self, Self::Snoop | Self::Gate)
    }
}

/// A program on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The program.
    pub program: Program,
    /// Interface index.
    pub ifindex: u32,
    /// Name of the interface when it was attached.
    pub interface: String,
    /// Where it is attached.
    pub hook: Hook,
    /// The list of filters that it is in, if it is attached by a filter.
    pub parent: Option<Parent>,
    /// Whether what an earlier agent had attached was taken over.
    pub adopted: bool,
}
