//! Inputs and outputs of the router's decisions: flows, actions, logged events.

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::topology::Site;

/// Index of a site, 0 for the first. Site numbers in events and requests are one higher.
pub type SiteIndex = usize;

/// A flow: packets of one source to one multicast address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// Unicast source address of the packets.
    pub source: Ipv6Addr,
    /// Destination address of the packets.
    pub multicast_address: Ipv6Addr,
}

/// An action that [`Tree`](super::tree::Tree) returns and the daemon carries out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Install or replace the kernel's route of a flow.
    SetRoute {
        /// Source and multicast address of the flow.
        flow: Flow,
        /// Multicast interface on which the flow arrives.
        incoming: u16,
        /// Sites that receive the flow.
        sites: Vec<SiteIndex>,
    },
    /// Append a line to the event log.
    Log(LoggedEvent),
}

/// One line of the event log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoggedEvent {
    /// Time of the event, in nanoseconds of CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// Kind and data of the event.
    #[serde(flatten)]
    pub event: Event,
}

/// Kinds of events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The first listener of a multicast address appeared at a site.
    Listener {
        /// Number of the site, 1 for the first.
        site: usize,
        /// Multicast address of the listener.
        multicast_address: Ipv6Addr,
    },
    /// The branch to a site is complete: packets flow if there are any.
    Grown {
        /// Number of the site, 1 for the first.
        site: usize,
        /// Multicast address of the branch.
        multicast_address: Ipv6Addr,
    },
    /// The branch ended: the last listener left, or the site lost multicast.
    Pruned {
        /// Number of the site, 1 for the first.
        site: usize,
        /// Multicast address of the branch.
        multicast_address: Ipv6Addr,
    },
    /// A flow was seen for the first time.
    Flow {
        /// Source and multicast address of the flow.
        #[serde(flatten)]
        flow: Flow,
    },
    /// The kind of a site changed.
    Site {
        /// Number of the site, 1 for the first.
        site: usize,
        /// New kind of the site.
        kind: Site,
    },
    /// The flow is not routed, because the router's table of flows is full.
    FlowsFull {
        /// Source and multicast address of the flow.
        #[serde(flatten)]
        flow: Flow,
    },
}
