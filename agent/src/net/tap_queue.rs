//! The queue of a TAP: its length, the frames read from it, and the frames it dropped.
//!
//! A full queue drops new frames and keeps the old ones. The kernel counts a frame as sent when the
//! hypervisor reads it.

use std::io;

use linux::interface;
use linux::netlink::{Netlink, Refusal, RequestError};
use netlink_packet_core::Nla as _;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoTun, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::stats::{StatsAttribute, StatsFilterMask, StatsMessage};

/// Present only on a TAP opened with `IFF_MULTI_QUEUE`; netlink-packet-route has no type for it.
const IFLA_TUN_NUM_QUEUES: u16 = 8;

/// Why the queue of a TAP cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum TapQueueError {
    /// The netlink socket failed.
    #[error("Cannot ask the kernel for the queue of a TAP: {0}; netlink must be permitted")]
    Netlink(#[source] io::Error),
    /// The kernel refused the request, for instance because the TAP no longer exists.
    #[error("The kernel refuses the queue of TAP {ifindex}: {refusal}")]
    Refused {
        /// Index of the TAP.
        ifindex: u32,
        /// Error of the kernel for the request.
        refusal: Refusal,
    },
    /// The kernel's answer lacks the attribute.
    #[error(
        "The kernel's answer about TAP {ifindex} is not understood; report it with the kernel's version"
    )]
    Answer {
        /// Index of the TAP.
        ifindex: u32,
    },
}

/// Counters of a TAP since its creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapCounts {
    /// Frames that the hypervisor has read (`tx_packets`).
    pub read: u64,
    /// Frames dropped because the queue was full (`tx_dropped`).
    pub dropped: u64,
}

/// Queue length in frames that a TAP gets, so that a VM receives what arrived during its downtime:
/// 1.8 s of 100 Mbit/s in packets of 1400 bytes.
pub const ROOM: u32 = 16_384;

/// Sets the queue of a TAP to [`ROOM`] unless the queue is longer already, in the network namespace
/// of the calling thread. Called once, before the VM's streams matter: while the kernel changes the
/// length, it discards the frames on their way through the qdisc and counts them nowhere.
///
/// # Errors
///
/// [`TapQueueError`].
pub fn make_room(ifindex: u32) -> Result<(), TapQueueError> {
    let mut queues = TapQueues::open()?;
    if queues.length(ifindex)? < ROOM {
        queues.set_length(ifindex, ROOM)?;
    }
    Ok(())
}

/// Access to the queues of TAPs in the network namespace of the thread that opened it.
pub struct TapQueues {
    netlink: Netlink,
}

impl TapQueues {
    /// Opens a netlink socket.
    ///
    /// # Errors
    ///
    /// [`TapQueueError::Netlink`].
    pub fn open() -> Result<Self, TapQueueError> {
        let netlink = Netlink::open().map_err(TapQueueError::Netlink)?;
        Ok(Self { netlink })
    }

    /// Returns the counters of a TAP. Takes about 10 us.
    ///
    /// # Errors
    ///
    /// [`TapQueueError`], for instance because the TAP no longer exists.
    pub fn counts(&mut self, ifindex: u32) -> Result<TapCounts, TapQueueError> {
        let mut request = StatsMessage::default();
        request.header.ifindex = ifindex;
        request.header.filter_mask = StatsFilterMask::Link64;
        let answer = self.netlink.get(RouteNetlinkMessage::GetStats(request));
        let RouteNetlinkMessage::NewStats(answer) = answer.map_err(error(ifindex))? else {
            return Err(TapQueueError::Answer { ifindex });
        };
        let stats = answer.attributes.iter().find_map(|it| match it {
            StatsAttribute::Link64(stats) => Some(stats),
            _ => None,
        });
        stats
            .map(|stats| TapCounts {
                read: stats.tx_packets,
                dropped: stats.tx_dropped,
            })
            .ok_or(TapQueueError::Answer { ifindex })
    }

    /// Returns the queue length in frames (`txqueuelen`).
    ///
    /// # Errors
    ///
    /// [`TapQueueError`].
    pub fn length(&mut self, ifindex: u32) -> Result<u32, TapQueueError> {
        let link = self.link(ifindex)?;
        let length = link.attributes.iter().find_map(|it| match it {
            LinkAttribute::TxQueueLen(frames) => Some(*frames),
            _ => None,
        });
        length.ok_or(TapQueueError::Answer { ifindex })
    }

    /// Returns the number of active queues, which the guest may change at any time; `None` for a
    /// TAP without multi-queue.
    ///
    /// # Errors
    ///
    /// [`TapQueueError`].
    pub fn queues(&mut self, ifindex: u32) -> Result<Option<u32>, TapQueueError> {
        Ok(queues(&self.link(ifindex)?))
    }

    /// Sets the queue length. Frames beyond a shorter length are dropped, the newest first.
    ///
    /// # Errors
    ///
    /// [`TapQueueError`].
    pub fn set_length(&mut self, ifindex: u32, frames: u32) -> Result<(), TapQueueError> {
        let mut link = LinkMessage::default();
        link.header.index = ifindex;
        link.attributes = vec![LinkAttribute::TxQueueLen(frames)];
        self.netlink
            .change(RouteNetlinkMessage::SetLink(link), 0)
            .map_err(error(ifindex))
    }

    fn link(&mut self, ifindex: u32) -> Result<LinkMessage, TapQueueError> {
        self.netlink.link(ifindex).map_err(error(ifindex))
    }
}

fn error(ifindex: u32) -> impl Fn(RequestError) -> TapQueueError {
    move |error| match error {
        RequestError::Socket(error) => TapQueueError::Netlink(error),
        RequestError::Refused(refusal) => TapQueueError::Refused { ifindex, refusal },
        RequestError::Answer => TapQueueError::Answer { ifindex },
    }
}

fn queues(link: &LinkMessage) -> Option<u32> {
    let settings = interface::info(link).find_map(|info| match info {
        LinkInfo::Data(InfoData::Tun(settings)) => Some(settings),
        _ => None,
    })?;
    settings.iter().find_map(|setting| match setting {
        InfoTun::Other(nla) if nla.kind() == IFLA_TUN_NUM_QUEUES => {
            let mut value = [0; 4];
            (nla.value_len() == value.len()).then(|| {
                nla.emit_value(&mut value);
                u32::from_ne_bytes(value)
            })
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use linux::netlink::{serialized, typed};
    use netlink_packet_core::DefaultNla;
    use netlink_packet_route::link::InfoKind;
    use proptest::prelude::*;

    use super::*;

    fn setting(kind: u16, value: &[u8]) -> InfoTun {
        InfoTun::Other(DefaultNla::new(kind, value.to_vec()))
    }

    /// A TAP's link message with these settings.
    fn tap(settings: Vec<InfoTun>) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName("vnet10".to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Tun),
                LinkInfo::Data(InfoData::Tun(settings)),
            ]),
        ];
        let bytes = serialized(RouteNetlinkMessage::NewLink(link), 0);
        match typed(&bytes) {
            Some(RouteNetlinkMessage::NewLink(link)) => link,
            other => panic!("no link: {other:?}"),
        }
    }

    #[test]
    fn number_of_queues_is_found_behind_others_of_odd_length() {
        let number = 3_u32.to_ne_bytes();
        let tap_of_many = tap(vec![
            setting(7, &[1, 2, 3]),
            setting(IFLA_TUN_NUM_QUEUES, &number),
        ]);
        assert_eq!(queues(&tap_of_many), Some(3));
        assert_eq!(queues(&tap(vec![setting(7, &number)])), None);
    }

    proptest! {
        #[test]
        fn any_number_of_queues_is_read_without_panic(
            value in prop::collection::vec(any::<u8>(), 0..16),
        ) {
            let found = queues(&tap(vec![setting(IFLA_TUN_NUM_QUEUES, &value)]));
            prop_assert_eq!(found.is_some(), value.len() == 4);
        }
    }
}
