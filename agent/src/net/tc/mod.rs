//! Traffic control of interfaces: qdiscs, and filters on them (rtnetlink).
//!
//! ```text
//!             ingress side                     egress side
//!    NIC --> qdisc `ingress`  --> bridge -->   root qdisc            --> NIC
//!            or `clsact`                       after `clsact`, if any
//! ```
//!
//! An interface has one qdisc at its ingress: `ingress`, which has one list of filters, or
//! `clsact`, which has a list for each side. **On a qdisc `ingress` the kernel takes every parent
//! for the ingress side**, so the qdisc's kind has to be known before a filter is added.

mod message;
mod notices;

use std::io;
use std::os::fd::RawFd;

use linux::netlink::{Netlink, Refusal, serialized};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};

pub use linux::netlink::Refusal as TcRefusal;
pub use notices::{Notice, Notices};

/// `TC_H_ROOT`.
pub const ROOT: u32 = 0xffff_ffff;
/// `TC_H_INGRESS`, which is `TC_H_CLSACT` too.
pub const INGRESS: u32 = 0xffff_fff1;
/// Handle of a qdisc `ingress` or `clsact`.
const INGRESS_HANDLE: u32 = 0xffff_0000;
/// `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS` of `clsact`.
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;

/// A side of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// What comes in by the interface.
    Ingress,
    /// What goes out by it.
    Egress,
}

impl Side {
    /// Name for the operator.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// A qdisc of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qdisc {
    /// The interface.
    pub ifindex: u32,
    /// Its kind (`htb`).
    pub kind: String,
    /// Its handle; 0 for the one that the kernel gave the interface by itself.
    pub handle: u32,
    /// Where it is.
    pub parent: u32,
}

/// A qdisc to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewQdisc {
    /// `ingress`.
    Ingress,
    /// `clsact`.
    Clsact,
    /// HTB without classes at the root: a plain queue, which has filters.
    Htb {
        /// Its handle.
        handle: u32,
        /// Most packets in it.
        queue: u32,
    },
    /// `noqueue` at the root: packets go to the driver at once.
    NoQueue,
}

impl NewQdisc {
    /// Its kind.
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

/// A list of filters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parent {
    /// That of the qdisc `ingress`.
    Ingress,
    /// One of the two of the qdisc `clsact`.
    Clsact(Side),
    /// That of a classful root qdisc.
    Root {
        /// Its handle.
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

/// A filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The interface.
    pub ifindex: u32,
    /// Where it is.
    pub parent: u32,
    /// Its kind (`bpf`).
    pub kind: String,
    /// Its preference (`pref`): the least comes first.
    pub preference: u16,
    /// Its protocol, an EtherType.
    pub protocol: u16,
    /// Its handle.
    pub handle: u32,
    /// Its chain.
    pub chain: u32,
    /// Its program, if its kind is `bpf`.
    pub program: Option<FilterProgram>,
}

/// The program of a filter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilterProgram {
    /// Its name in the filter: free text.
    pub name: String,
    /// Its identifier.
    pub id: Option<u32>,
}

/// A filter of a program that decides itself (`direct-action`), for all protocols.
#[derive(Clone, Copy, Debug)]
pub struct BpfFilter<'a> {
    /// Its name.
    pub name: &'a str,
    /// Descriptor of the program.
    pub program: RawFd,
    /// Its preference.
    pub preference: u16,
    /// Its handle.
    pub handle: u32,
}

/// Traffic control of the network namespace that it was opened in.
pub struct TrafficControl(Netlink);

impl TrafficControl {
    /// Opens it for the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// What the socket says.
    pub fn open() -> io::Result<Self> {
        Netlink::open().map(Self)
    }

    /// The qdiscs of all interfaces. Before an interface is up for the first time the kernel tells
    /// of none.
    ///
    /// All at once: kernels before 6.7 answer a request for one by a notice to everybody, this
    /// process included.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn all_qdiscs(&mut self) -> io::Result<Vec<Qdisc>> {
        let mut qdiscs = Vec::new();
        let request = serialized(message::dump_qdiscs(), NLM_F_DUMP);
        self.0.dump_messages(request, |answer| {
            qdiscs.extend(message::qdisc(answer));
        })?;
        Ok(qdiscs)
    }

    /// Makes a qdisc where there is none of anybody's.
    ///
    /// # Errors
    ///
    /// What the kernel says, for instance `EEXIST` where there is one.
    pub fn add_qdisc(&mut self, ifindex: u32, qdisc: NewQdisc) -> Result<(), Refusal> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        Ok(self.0.change(message::new_qdisc(ifindex, qdisc), flags)?)
    }

    /// Removes a qdisc, unless another one has taken its place.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn delete_qdisc(&mut self, qdisc: &Qdisc) -> Result<(), Refusal> {
        Ok(self.0.change(message::delete_qdisc(qdisc), 0)?)
    }

    /// The filters of a list, in the order in which they see packets.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn filters(&mut self, ifindex: u32, parent: Parent) -> io::Result<Vec<Filter>> {
        let mut filters = Vec::new();
        let request = serialized(message::dump_filters(ifindex, parent), NLM_F_DUMP);
        self.0.dump_messages(request, |answer| {
            filters.extend(message::filter(answer).filter(|filter| filter.ifindex == ifindex));
        })?;
        Ok(filters)
    }

    /// Makes a filter, or exchanges the program of the one with that preference and handle, in one
    /// step.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_filter(
        &mut self,
        ifindex: u32,
        parent: Parent,
        filter: &BpfFilter<'_>,
    ) -> Result<(), Refusal> {
        let message = message::set_filter(ifindex, parent, filter);
        Ok(self.0.change(message, NLM_F_CREATE | NLM_F_REPLACE)?)
    }

    /// Removes a filter.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn delete_filter(&mut self, filter: &Filter) -> Result<(), Refusal> {
        let message = message::delete_filter(filter.ifindex, filter);
        Ok(self.0.change(message, 0)?)
    }
}
