//! Link addresses of the next hops towards agents.
//!
//! The eBPF programs send by `bpf_fib_lookup`. The lookup fails while the kernel does not know the
//! link address of the next hop, and the lookup itself starts no resolution. The agent therefore
//! creates a managed neighbour entry (`NTF_EXT_MANAGED`, kernel 5.16) for each next hop: the kernel
//! resolves the entry and refreshes it by itself. A managed entry outlives this process.
//!
//! The kernel deletes neighbour entries, managed ones too, when the interface changes its MAC (as a
//! bridge does when its ports change), loses its carrier, or is flushed by a command. The agent
//! listens to `RTNLGRP_NEIGH` and creates a deleted entry again at once.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv6Addr;
use std::time::Duration;

use linux::netlink::bytes::{Message, messages};
use linux::netlink::{AsyncNotices, Group, Heard, Netlink, Refusal, RequestError, typed};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use tokio::time::{Instant, sleep_until};

/// Reachable, stale, delay, probe, no ARP, permanent: the states that `bpf_fib_lookup` accepts.
const NUD_VALID: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80;
/// Notices read in one batch.
const MAX_NOTICES: usize = 256;
/// Pause after a batch of notices: a VM can change its host's neighbours as fast as it sends.
const REST: Duration = Duration::from_millis(10);

/// Why an address cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum NeighbourError {
    /// The netlink socket failed.
    #[error("the kernel cannot be asked: {0}")]
    Netlink(#[source] io::Error),
    /// The kernel has no route to the address.
    #[error("there is no route to it ({0})")]
    NoRoute(Refusal),
    /// The address belongs to this host.
    #[error("it is an address of the relay's own host")]
    Own,
    /// The route is not a unicast route, or names no interface.
    #[error("its route leads nowhere")]
    Nowhere,
    /// The kernel refused the neighbour entry.
    #[error("the link address of {next_hop} cannot be asked for: {refusal}")]
    Refused {
        /// IPv6 address whose link address was to be resolved.
        next_hop: Ipv6Addr,
        /// Error of the kernel for `RTM_NEWNEIGH`.
        refusal: Refusal,
    },
}

/// Output interface and next hop of the route to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    ifindex: u32,
    next_hop: Ipv6Addr,
}

/// The managed neighbour entries, by the address they lead to. Dropping the value leaves the
/// entries in the kernel.
pub struct Neighbours {
    netlink: Netlink,
    ways: BTreeMap<Ipv6Addr, Way>,
    /// Notices about neighbours; `None` while there is no next hop to watch.
    notices: Option<AsyncNotices>,
    rest_until: Instant,
}

impl Neighbours {
    /// Opens netlink in the network namespace of the calling thread, with no next hop.
    ///
    /// # Errors
    ///
    /// The error of `socket(2)`.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
            ways: BTreeMap::new(),
            notices: None,
            rest_until: Instant::now(),
        })
    }

    /// Waits for notices about the next hops, and resolves those again that the kernel has deleted.
    /// Returns true if it resolved any; neighbours may then know this host by another MAC. Cancel
    /// safe.
    ///
    /// # Errors
    ///
    /// The error of the netlink socket.
    pub async fn keep(&mut self) -> io::Result<bool> {
        if self.ways.is_empty() {
            self.notices = None;
            return std::future::pending().await;
        }
        sleep_until(self.rest_until).await;
        let lost = match &self.notices {
            Some(notices) => lost(notices).await?,
            None => {
                self.notices = Some(AsyncNotices::open(&[Group::Neighbour])?);
                // Notices from before the socket was opened are lost: treat every next hop as
                // deleted.
                None
            }
        };
        self.rest_until = Instant::now() + REST;
        Ok(self.resolve_lost(lost.as_deref()))
    }

    /// Resolves again each address whose next hop is in `lost`, or every address if `lost` is
    /// `None` (notices were lost). Returns true if there were any.
    fn resolve_lost(&mut self, lost: Option<&[Way]>) -> bool {
        let addresses: Vec<Ipv6Addr> = (self.ways.iter())
            .filter(|(_, way)| lost.is_none_or(|lost| lost.contains(way)))
            .map(|(address, _)| *address)
            .collect();
        for address in &addresses {
            match self.resolve(*address) {
                Ok(known) => tracing::debug!(%address, known, "Next hop is looked up again"),
                Err(error) => tracing::debug!(%address, %error, "Next hop is lost"),
            }
        }
        !addresses.is_empty()
    }

    /// Creates or refreshes the managed entry of the next hop towards `address`. Returns true if
    /// the kernel knows the link address. The caller repeats the call until then, and from time to
    /// time later, because routes change.
    ///
    /// # Errors
    ///
    /// See [`NeighbourError`].
    pub fn resolve(&mut self, address: Ipv6Addr) -> Result<bool, NeighbourError> {
        let way = self.way(address)?;
        if let Some(old) = self.ways.insert(address, way)
            && old != way
        {
            self.release(old);
        }
        self.ask(way, NeighbourExtFlags::Managed)
            .map_err(|error| match error {
                RequestError::Socket(error) => NeighbourError::Netlink(error),
                error => NeighbourError::Refused {
                    next_hop: way.next_hop,
                    refusal: error.into(),
                },
            })?;
        Ok(self.state(way).map_err(NeighbourError::Netlink)? & NUD_VALID != 0)
    }

    /// Stops managing the next hop towards `address`, unless another address uses the same next
    /// hop.
    pub fn forget(&mut self, address: Ipv6Addr) {
        if let Some(way) = self.ways.remove(&address) {
            self.release(way);
        }
    }

    /// The addresses whose next hops are managed.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv6Addr> + '_ {
        self.ways.keys().copied()
    }

    fn release(&mut self, way: Way) {
        if self.ways.values().any(|used| *used == way) {
            return;
        }
        // Fails only if the interface, and its neighbour entries, no longer exist.
        if let Err(error) = self.ask(way, NeighbourExtFlags::empty()) {
            tracing::debug!(next_hop = %way.next_hop, %error, "Neighbour was gone already");
        }
    }

    fn way(&mut self, address: Ipv6Addr) -> Result<Way, NeighbourError> {
        let mut request = RouteMessage::default();
        request.header.address_family = AddressFamily::Inet6;
        request.header.destination_prefix_length = 128;
        let destination = RouteAddress::Inet6(address);
        request.attributes = vec![RouteAttribute::Destination(destination)];
        match self.netlink.get(RouteNetlinkMessage::GetRoute(request)) {
            Ok(RouteNetlinkMessage::NewRoute(route)) => way_of(address, &route),
            Ok(_) | Err(RequestError::Answer) => Err(NeighbourError::Nowhere),
            Err(RequestError::Socket(error)) => Err(NeighbourError::Netlink(error)),
            Err(RequestError::Refused(refusal)) => Err(NeighbourError::NoRoute(refusal)),
        }
    }

    /// Creates or updates the entry of a next hop with these flags. `NTF_USE` starts the
    /// resolution.
    fn ask(&mut self, way: Way, flags: NeighbourExtFlags) -> Result<(), RequestError> {
        let mut message = entry(way);
        message.header.flags = NeighbourFlags::Use;
        message.attributes.push(NeighbourAttribute::ExtFlags(flags));
        self.netlink.change(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// `ndm_state` of a next hop; 0 if there is no entry.
    fn state(&mut self, way: Way) -> io::Result<u16> {
        let request = RouteNetlinkMessage::GetNeighbour(entry(way));
        match self.netlink.get(request) {
            Ok(RouteNetlinkMessage::NewNeighbour(found)) => Ok(found.header.state.into()),
            Err(RequestError::Socket(error)) => Err(error),
            Ok(_) | Err(_) => Ok(0),
        }
    }
}

/// Waits for notices and returns the next hops that the kernel has deleted; `None` if the kernel
/// dropped notices.
async fn lost(notices: &AsyncNotices) -> io::Result<Option<Vec<Way>>> {
    let mut lost = Vec::new();
    let mut heard = Some(notices.next().await?);
    for _ in 0..MAX_NOTICES {
        match heard {
            Some(Heard::Datagram(bytes)) => lost.extend(messages(&bytes).filter_map(deleted)),
            Some(Heard::Lost) => return Ok(None),
            None => break,
        }
        heard = notices.try_next()?;
    }
    Ok(Some(lost))
}

/// The next hop of an `RTM_DELNEIGH`; `None` for any other message.
fn deleted(message: Message<'_>) -> Option<Way> {
    let Some(RouteNetlinkMessage::DelNeighbour(gone)) = typed(message.bytes) else {
        return None;
    };
    let next_hop = gone.attributes.iter().find_map(|it| match it {
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(*address),
        _ => None,
    });
    Some(Way {
        ifindex: gone.header.ifindex,
        next_hop: next_hop?,
    })
}

fn entry(way: Way) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.ifindex = way.ifindex;
    let next_hop = NeighbourAddress::Inet6(way.next_hop);
    message.attributes = vec![NeighbourAttribute::Destination(next_hop)];
    message
}

fn way_of(address: Ipv6Addr, route: &RouteMessage) -> Result<Way, NeighbourError> {
    match route.header.kind {
        RouteType::Local => return Err(NeighbourError::Own),
        RouteType::Unicast => {}
        _ => return Err(NeighbourError::Nowhere),
    }
    let attributes = || route.attributes.iter();
    let ifindex = attributes().find_map(|attribute| match attribute {
        RouteAttribute::Oif(ifindex) => Some(*ifindex),
        _ => None,
    });
    let gateway = attributes().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet6(gateway)) => Some(*gateway),
        _ => None,
    });
    Ok(Way {
        ifindex: ifindex.ok_or(NeighbourError::Nowhere)?,
        next_hop: gateway.unwrap_or(address),
    })
}
