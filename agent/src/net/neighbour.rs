//! Link addresses of the next hops towards agents.
//!
//! The kernel programs send by `bpf_fib_lookup`, which fails while the link address of the next hop
//! is not known and asks nobody for it. So the kernel is told to find it out, and to go on doing so
//! by itself (`NTF_EXT_MANAGED`, kernel 5.16): that outlives this process.
//!
//! The kernel throws entries away, managed ones too, when the interface gets another MAC (a bridge
//! whose ports change), loses its carrier, or is told to. That is heard (`RTNLGRP_NEIGH`), and the
//! kernel told anew at once.

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

/// Reachable, stale, delay, probe, no ARP, permanent: what `bpf_fib_lookup` takes.
const NUD_VALID: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80;
/// How many notices are read at once.
const MAX_NOTICES: usize = 256;
/// How long none is read afterwards. A VM can make its host's neighbours change as fast as it sends.
const REST: Duration = Duration::from_millis(10);

/// Why there is no way to an address.
#[derive(Debug, thiserror::Error)]
pub enum NeighbourError {
    /// Netlink does not work.
    #[error("the kernel cannot be asked: {0}")]
    Netlink(#[source] io::Error),
    /// There is none.
    #[error("there is no route to it ({0})")]
    NoRoute(Refusal),
    /// It is on this host.
    #[error("it is an address of the relay's own host")]
    Own,
    /// The route does not lead to a host.
    #[error("its route leads nowhere")]
    Nowhere,
    /// The kernel refuses to ask.
    #[error("the link address of {next_hop} cannot be asked for: {refusal}")]
    Refused {
        /// The next hop.
        next_hop: Ipv6Addr,
        /// What the kernel said.
        refusal: Refusal,
    },
}

/// Where packets to an address go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Way {
    ifindex: u32,
    next_hop: Ipv6Addr,
}

/// The next hops that the kernel keeps known. Dropping it changes nothing.
pub struct Neighbours {
    netlink: Netlink,
    ways: BTreeMap<Ipv6Addr, Way>,
    /// What becomes of neighbours, while there are next hops.
    notices: Option<AsyncNotices>,
    rest_until: Instant,
}

impl Neighbours {
    /// None yet, in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// What `socket(2)` says.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
            ways: BTreeMap::new(),
            notices: None,
            rest_until: Instant::now(),
        })
    }

    /// Hears what becomes of the next hops, and has those known again that the kernel throws away.
    /// Returns now and then, whether it has; then neighbours may know this host by another MAC. Can be
    /// cancelled.
    ///
    /// # Errors
    ///
    /// What the socket says.
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
                // What was lost before was not heard.
                None
            }
        };
        self.rest_until = Instant::now() + REST;
        Ok(self.resolve_lost(lost.as_deref()))
    }

    /// Resolves what led by these next hops, or all where it is not known which were lost. Returns whether
    /// there were any.
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

    /// Has the kernel find out the link address on the way to `address`, and keep it; says whether
    /// it is known. To be called again until it is, and now and then, because routes change.
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

    /// Has the kernel keep the link address on the way to `address` no longer.
    pub fn forget(&mut self, address: Ipv6Addr) {
        if let Some(way) = self.ways.remove(&address) {
            self.release(way);
        }
    }

    /// The addresses that are kept known.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv6Addr> + '_ {
        self.ways.keys().copied()
    }

    fn release(&mut self, way: Way) {
        if self.ways.values().any(|used| *used == way) {
            return;
        }
        // Fails when the interface is gone, and the neighbour with it.
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

    /// Has the kernel use the entry of a next hop, which makes it ask, and sets its flags.
    fn ask(&mut self, way: Way, flags: NeighbourExtFlags) -> Result<(), RequestError> {
        let mut message = entry(way);
        message.header.flags = NeighbourFlags::Use;
        message.attributes.push(NeighbourAttribute::ExtFlags(flags));
        self.netlink.change(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// `ndm_state` of a next hop, 0 where there is no entry.
    fn state(&mut self, way: Way) -> io::Result<u16> {
        let request = RouteNetlinkMessage::GetNeighbour(entry(way));
        match self.netlink.get(request) {
            Ok(RouteNetlinkMessage::NewNeighbour(found)) => Ok(found.header.state.into()),
            Err(RequestError::Socket(error)) => Err(error),
            Ok(_) | Err(_) => Ok(0),
        }
    }
}

/// Waits for notices; returns the next hops that the kernel has thrown away, `None` where notices
/// were lost.
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

/// The neighbour that a notice says is gone.
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
