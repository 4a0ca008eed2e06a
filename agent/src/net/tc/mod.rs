//! Traffic control of interfaces: qdiscs and their filters (rtnetlink).
//!
//! ```text
//!             ingress side                     egress side
//!    NIC --> qdisc `ingress`  --> bridge -->   root qdisc            --> NIC
//!            or `clsact`                       after `clsact`, if any
//! ```
//!
//! An interface has at most one ingress qdisc: `ingress` with one filter list, or `clsact` with one
//! list per direction. **On a qdisc `ingress` the kernel takes every parent as the ingress
//! direction**; the kind of the qdisc must therefore be known before a filter is added.

mod message;
mod notices;

use std::io;
use std::os::fd::RawFd;

use linux::netlink::{Netlink, Refusal, serialized};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};

pub use linux::netlink::Refusal as TcRefusal;
pub use notices::{Notice, Notices};

/// `TC_H_ROOT`: parent of the root qdisc.
pub const ROOT: u32 = 0xffff_ffff;
/// `TC_H_INGRESS`, equal to `TC_H_CLSACT`: parent of a qdisc `ingress` or `clsact`.
pub const INGRESS: u32 = 0xffff_fff1;
/// Handle of a qdisc `ingress` or `clsact`.
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS` of `clsact`: its two filter lists.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;

/// Direction of traffic on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Packets that the interface receives.
    Ingress,
    /// Packets that the interface sends.
    Egress,
}

impl Side {
    /// Returns the name shown to the operator.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// A qdisc as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qdisc {
    /// Index of its interface.
    pub ifindex: u32,
    /// Kind in the kernel's terms (`htb`, `clsact`).
    pub kind: String,
    /// Qdisc handle (`tcm_handle`); 0 for the default qdisc that the kernel attached.
    pub handle: u32,
    /// `tcm_parent`: [`ROOT`], [`INGRESS`], or a class.
    pub parent: u32,
}

/// A qdisc to create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewQdisc {
    /// `ingress` at [`INGRESS`], with one filter list.
    Ingress,
    /// `clsact` at [`INGRESS`], with one filter list per direction.
    Clsact,
    /// HTB without classes at the root: a plain queue that has filters.
    Htb {
        /// Qdisc handle, major number in the upper 16 bits.
        handle: u32,
        /// Queue length in packets (`TCA_HTB_DIRECT_QLEN`).
        queue: u32,
    },
    /// `noqueue` at the root: packets reach the driver without a queue.
    NoQueue,
}

impl NewQdisc {
    /// Returns the kernel's name of the kind (`TCA_KIND`).
    pub fn kind(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Clsact => "clsact",
            Self::Htb { .. } => "htb",
            Self::NoQueue => "noqueue",
        }
    }

    fn parent(self) -> u32 {
        match self {
            Self::Ingress | Self::Clsact => INGRESS,
            Self::Htb { .. } | Self::NoQueue => ROOT,
        }
    }

    fn handle(self) -> u32 {
        match self {
            Self::Ingress | Self::Clsact => INGRESS_HANDLE,
            Self::Htb { handle, .. } => handle,
            Self::NoQueue => 0,
        }
    }
}

/// A list of filters, by its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// The single list of a qdisc `ingress`.
    Ingress,
    /// One of the two lists of a qdisc `clsact`.
    Clsact(Side),
    /// The list of a classful root qdisc.
    Root {
        /// Handle of that qdisc.
        handle: u32,
    },
}

impl Parent {
    fn handle(self) -> u32 {
        match self {
            Self::Ingress => INGRESS_HANDLE,
            Self::Clsact(Side::Ingress) => CLSACT_INGRESS,
            Self::Clsact(Side::Egress) => CLSACT_EGRESS,
            Self::Root { handle } => handle,
        }
    }
}

/// A filter as the kernel reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// Index of its interface.
    pub ifindex: u32,
    /// `tcm_parent`: the list that contains the filter.
    pub parent: u32,
    /// Kind in the kernel's terms (`bpf`, `flower`).
    pub kind: String,
    /// Preference (`pref`); the kernel tries low values first.
    pub preference: u16,
    /// EtherType that the filter applies to, host byte order.
    pub protocol: u16,
    /// Filter handle, unique within its preference (`tcm_handle`).
    pub handle: u32,
    /// Number of the filter chain (`TCA_CHAIN`); 0 if the kernel names none.
    pub chain: u32,
    /// eBPF program of a filter of kind `bpf`; `None` for other kinds.
    pub program: Option<FilterProgram>,
}

/// The eBPF program that a filter of kind `bpf` runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilterProgram {
    /// Free text given at creation (`TCA_BPF_NAME`).
    pub name: String,
    /// Program identifier; `None` if the kernel reports none.
    pub id: Option<u32>,
}

/// A `bpf` filter with `direct-action` for all protocols: the program returns the verdict itself.
#[derive(Clone, Copy, Debug)]
pub struct BpfFilter<'a> {
    /// Free text (`TCA_BPF_NAME`), by which an agent recognizes its filters.
    pub name: &'a str,
    /// Descriptor of the program.
    pub program: RawFd,
    /// Position among the filters of the list; the kernel tries low values first.
    pub preference: u16,
    /// Filter handle, unique within `preference`.
    pub handle: u32,
}

/// Traffic control of one network namespace.
pub struct TrafficControl(Netlink);

impl TrafficControl {
    /// Opens a netlink socket in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The error of the socket.
    pub fn open() -> io::Result<Self> {
        Netlink::open().map(Self)
    }

    /// Returns the qdiscs of all interfaces. The kernel reports none for an interface that was
    /// never up.
    ///
    /// This is one dump for all interfaces: kernels before 6.7 answer a request for a single
    /// interface with a notice to every listener, this process included.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn all_qdiscs(&mut self) -> io::Result<Vec<Qdisc>> {
        let mut qdiscs = Vec::new();
        let request = serialized(message::dump_qdiscs(), NLM_F_DUMP);
        self.0.dump_messages(request, |answer| {
            qdiscs.extend(message::qdisc(answer));
        })?;
        Ok(qdiscs)
    }

    /// Creates a qdisc; never replaces one.
    ///
    /// # Errors
    ///
    /// The error of the kernel, for instance `EEXIST` if there is a qdisc already.
    pub fn add_qdisc(&mut self, ifindex: u32, qdisc: NewQdisc) -> Result<(), Refusal> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        Ok(self.0.change(message::new_qdisc(ifindex, qdisc), flags)?)
    }

    /// Deletes a qdisc, unless another qdisc has taken its place.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn delete_qdisc(&mut self, qdisc: &Qdisc) -> Result<(), Refusal> {
        Ok(self.0.change(message::delete_qdisc(qdisc), 0)?)
    }

    /// Returns the filters of a list, in the order in which packets pass them.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn filters(&mut self, ifindex: u32, parent: Parent) -> io::Result<Vec<Filter>> {
        let mut filters = Vec::new();
        let request = serialized(message::dump_filters(ifindex, parent), NLM_F_DUMP);
        self.0.dump_messages(request, |answer| {
            filters.extend(message::filter(answer).filter(|filter| filter.ifindex == ifindex));
        })?;
        Ok(filters)
    }

    /// Creates a filter, or atomically replaces the program of the filter with this preference and
    /// handle.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn set_filter(
        &mut self,
        ifindex: u32,
        parent: Parent,
        filter: &BpfFilter<'_>,
    ) -> Result<(), Refusal> {
        let message = message::set_filter(ifindex, parent, filter);
        Ok(self.0.change(message, NLM_F_CREATE | NLM_F_REPLACE)?)
    }

    /// Deletes a filter.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn delete_filter(&mut self, filter: &Filter) -> Result<(), Refusal> {
        let message = message::delete_filter(filter.ifindex, filter);
        Ok(self.0.change(message, 0)?)
    }
}
