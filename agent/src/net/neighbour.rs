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

use netlink_packet_core::NetlinkPayload;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket};
use tokio::time::{Instant, sleep_until};

use super::netlink::{self, HEADER_BYTES, Refusal, RequestBytes, Requests};

const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_GETNEIGH: u16 = 30;
const RTA_DST: u16 = 1;
const NDA_DST: u16 = 1;
const NDA_FLAGS_EXT: u16 = 15;
const NTF_USE: u8 = 1;
const NTF_EXT_MANAGED: u32 = 1;
/// Reachable, stale, delay, probe, no ARP, permanent: what `bpf_fib_lookup` takes.
const NUD_VALID: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80;
/// `RTNLGRP_NEIGH`.
const NEIGHBOUR_GROUP: u32 = 3;
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
    requests: Requests,
    ways: BTreeMap<Ipv6Addr, Way>,
    /// What becomes of neighbours, while there are next hops.
    notices: Option<TokioSocket>,
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
            requests: Requests::open()?,
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
                let mut notices = TokioSocket::new(NETLINK_ROUTE)?;
                notices.socket_mut().bind_auto()?;
                notices.socket_ref().add_membership(NEIGHBOUR_GROUP)?;
                self.notices = Some(notices);
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
        self.ask(way, NTF_EXT_MANAGED)
            .map_err(NeighbourError::Netlink)?
            .map_err(|refusal| NeighbourError::Refused {
                next_hop: way.next_hop,
                refusal,
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
        if let Ok(Err(refusal)) | Err(refusal) = self.ask(way, 0).map_err(Refusal::from) {
            tracing::debug!(next_hop = %way.next_hop, %refusal, "Neighbour was gone already");
        }
    }

    fn way(&mut self, address: Ipv6Addr) -> Result<Way, NeighbourError> {
        let mut request = RequestBytes::new(RTM_GETROUTE, NLM_F_REQUEST);
        // `struct rtmsg` with the length of the destination.
        request.push(&[libc::AF_INET6 as u8, 128, 0, 0, 0, 0, 0, 0]);
        request.push(&0_u32.to_ne_bytes());
        request.attribute(RTA_DST, &address.octets());
        let answer = self
            .requests
            .get(request.finish())
            .map_err(NeighbourError::Netlink)?
            .map_err(NeighbourError::NoRoute)?;
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map(|it| it.payload) {
            Ok(NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route))) => {
                way_of(address, &route)
            }
            _ => Err(NeighbourError::Nowhere),
        }
    }

    /// Has the kernel use the entry of a next hop, which makes it ask, and sets its flags.
    fn ask(&mut self, way: Way, flags: u32) -> io::Result<Result<(), Refusal>> {
        let options = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let mut request = neighbour_request(RTM_NEWNEIGH, options, way, NTF_USE);
        request.attribute(NDA_FLAGS_EXT, &flags.to_ne_bytes());
        let outcomes = self.requests.apply(&mut [request.finish()])?;
        Ok(outcomes.into_iter().next().unwrap_or(Ok(())))
    }

    /// `ndm_state` of a next hop, 0 where there is no entry.
    fn state(&mut self, way: Way) -> io::Result<u16> {
        const STATE: usize = HEADER_BYTES + 8;
        let request = neighbour_request(RTM_GETNEIGH, NLM_F_REQUEST, way, 0);
        Ok(self.requests.get(request.finish())?.map_or(0, |answer| {
            answer
                .get(STATE..STATE + 2)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, u16::from_ne_bytes)
        }))
    }
}

/// Waits for notices; returns the next hops that the kernel has thrown away, `None` where notices
/// were lost.
async fn lost(notices: &TokioSocket) -> io::Result<Option<Vec<Way>>> {
    let mut lost = Vec::new();
    let mut datagram = notices.recv_from_full().await;
    for _ in 0..MAX_NOTICES {
        match datagram {
            Ok((bytes, _)) => lost.extend(netlink::messages(&bytes).filter_map(deleted)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(None),
            Err(error) => return Err(error),
        }
        datagram = notices.socket_ref().recv_from_full();
    }
    Ok(Some(lost))
}

/// The neighbour that a notice says is gone.
fn deleted(message: netlink::Message<'_>) -> Option<Way> {
    const ATTRIBUTES: usize = HEADER_BYTES + 12;
    if message.kind != RTM_DELNEIGH {
        return None;
    }
    let ifindex = message.bytes.get(HEADER_BYTES + 4..HEADER_BYTES + 8)?;
    let next_hop: [u8; 16] = netlink::values(message.bytes.get(ATTRIBUTES..)?, NDA_DST)
        .next()?
        .try_into()
        .ok()?;
    Some(Way {
        ifindex: u32::from_ne_bytes(ifindex.try_into().ok()?),
        next_hop: next_hop.into(),
    })
}

/// `struct ndmsg` with the address.
fn neighbour_request(kind: u16, options: u16, way: Way, flags: u8) -> RequestBytes {
    let mut request = RequestBytes::new(kind, options);
    request.push(&[libc::AF_INET6 as u8, 0, 0, 0]);
    request.push(&way.ifindex.to_ne_bytes());
    request.push(&[0, 0, flags, 0]);
    request.attribute(NDA_DST, &way.next_hop.octets());
    request
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
