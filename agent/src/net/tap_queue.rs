//! The queue of a TAP: what was taken from it, what it had no room for, how long it is.
//!
//! The queue keeps its oldest frames: what comes while it is full is dropped. The kernel counts a
//! frame as sent when the hypervisor reads it.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST};

use super::netlink::{HEADER_BYTES, Refusal, RequestBytes, Requests, values};

const RTM_SETLINK: u16 = 19;
const RTM_GETLINK: u16 = 18;
const RTM_GETSTATS: u16 = 94;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_DATA: u16 = 2;
/// There only of a TAP that was opened with `IFF_MULTI_QUEUE`.
const IFLA_TUN_NUM_QUEUES: u16 = 8;
/// Attribute, and bit of the filter, that is `struct rtnl_link_stats64`.
const IFLA_STATS_LINK_64: u16 = 1;
/// Bytes of `struct if_stats_msg`.
const STATS_MESSAGE_BYTES: usize = 12;
/// Bytes of `struct ifinfomsg`.
const LINK_MESSAGE_BYTES: usize = 16;
/// Where `tx_packets` stands in `struct rtnl_link_stats64`, bytes.
const TX_PACKETS: usize = 8;
/// Where `tx_dropped` stands.
const TX_DROPPED: usize = 56;

/// Why a TAP's queue cannot be looked at or changed.
#[derive(Debug, thiserror::Error)]
pub enum TapQueueError {
    /// Netlink does not work.
    #[error("Cannot ask the kernel for the queue of a TAP: {0}; netlink must be permitted")]
    Netlink(#[source] io::Error),
    /// The kernel refuses; the TAP may be gone.
    #[error("The kernel refuses the queue of TAP {ifindex}: {refusal}")]
    Refused {
        /// The TAP.
        ifindex: u32,
        /// What it said.
        refusal: Refusal,
    },
    /// The kernel's answer has no such field.
    #[error(
        "The kernel's answer about TAP {ifindex} is not understood; report it with the kernel's version"
    )]
    Answer {
        /// The TAP.
        ifindex: u32,
    },
}

/// Counts of a TAP since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TapCounts {
    /// Frames that the hypervisor has read (`tx_packets`).
    pub read: u64,
    /// Frames that found the queue full (`tx_dropped`).
    pub dropped: u64,
}

/// Frames that the queue of a TAP gets room for, so that a VM finds what came during a pause: 1.8 s of
/// 100 Mbit/s in packets of 1400 bytes.
pub const ROOM: u32 = 16_384;

/// Gives the queue of a TAP [`ROOM`], in the network namespace of the calling thread, unless it has more
/// already. To be done once, before the VM's streams matter: while the kernel changes the length, it
/// throws away what is on its way through the qdisc, and counts it nowhere.
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

/// Access to the queues of TAPs, in the network namespace of the thread that opened it.
pub struct TapQueues {
    requests: Requests,
}

impl TapQueues {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// [`TapQueueError::Netlink`].
    pub fn open() -> Result<Self, TapQueueError> {
        let requests = Requests::open().map_err(TapQueueError::Netlink)?;
        Ok(Self { requests })
    }

    /// What was read and dropped so far. Takes about 10 us.
    ///
    /// # Errors
    ///
    /// [`TapQueueError`]; the TAP may be gone.
    pub fn counts(&mut self, ifindex: u32) -> Result<TapCounts, TapQueueError> {
        let mut request = RequestBytes::new(RTM_GETSTATS, NLM_F_REQUEST);
        // Family and padding, interface, filter.
        request.push(&[0; 4]);
        request.push(&ifindex.to_ne_bytes());
        request.push(&(1_u32 << (IFLA_STATS_LINK_64 - 1)).to_ne_bytes());
        let answer = self.get(ifindex, request)?;
        attribute(&answer, STATS_MESSAGE_BYTES, IFLA_STATS_LINK_64)
            .and_then(|stats| {
                Some(TapCounts {
                    read: number(stats, TX_PACKETS)?,
                    dropped: number(stats, TX_DROPPED)?,
                })
            })
            .ok_or(TapQueueError::Answer { ifindex })
    }

    /// Frames that the queue has room for (`txqueuelen`).
    ///
    /// # Errors
    ///
    /// [`TapQueueError`].
    pub fn length(&mut self, ifindex: u32) -> Result<u32, TapQueueError> {
        let mut request = RequestBytes::new(RTM_GETLINK, NLM_F_REQUEST);
        request.push(&link_message(ifindex));
        let answer = self.get(ifindex, request)?;
        attribute(&answer, LINK_MESSAGE_BYTES, IFLA_TXQLEN)
            .and_then(|value| value.first_chunk())
            .map(|bytes| u32::from_ne_bytes(*bytes))
            .ok_or(TapQueueError::Answer { ifindex })
    }

    /// Queues into which frames go, which the guest may change at any time; `None` for a TAP that cannot
    /// have several.
    ///
    /// # Errors
    ///
    /// [`TapQueueError`].
    pub fn queues(&mut self, ifindex: u32) -> Result<Option<u32>, TapQueueError> {
        let mut request = RequestBytes::new(RTM_GETLINK, NLM_F_REQUEST);
        request.push(&link_message(ifindex));
        let answer = self.get(ifindex, request)?;
        Ok(attribute(&answer, LINK_MESSAGE_BYTES, IFLA_LINKINFO)
            .and_then(|info| values(info, IFLA_INFO_DATA).next())
            .and_then(|data| values(data, IFLA_TUN_NUM_QUEUES).next())
            .and_then(|value| value.first_chunk())
            .map(|bytes| u32::from_ne_bytes(*bytes)))
    }

    /// Changes the room of the queue. Frames that no longer fit are dropped, the newest first.
    ///
    /// # Errors
    ///
    /// [`TapQueueError`].
    pub fn set_length(&mut self, ifindex: u32, frames: u32) -> Result<(), TapQueueError> {
        let mut request = RequestBytes::new(RTM_SETLINK, NLM_F_REQUEST | NLM_F_ACK);
        request.push(&link_message(ifindex));
        request.attribute(IFLA_TXQLEN, &frames.to_ne_bytes());
        let outcomes = self
            .requests
            .apply(&mut [request.finish()])
            .map_err(TapQueueError::Netlink)?;
        outcomes
            .into_iter()
            .collect::<Result<(), Refusal>>()
            .map_err(|refusal| TapQueueError::Refused { ifindex, refusal })
    }

    fn get(&mut self, ifindex: u32, request: RequestBytes) -> Result<Vec<u8>, TapQueueError> {
        self.requests
            .get(request.finish())
            .map_err(TapQueueError::Netlink)?
            .map_err(|refusal| TapQueueError::Refused { ifindex, refusal })
    }
}

/// `struct ifinfomsg` of an interface.
fn link_message(ifindex: u32) -> [u8; LINK_MESSAGE_BYTES] {
    let mut message = [0; LINK_MESSAGE_BYTES];
    message[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    message
}

/// Value of an attribute behind the fixed part of a message.
fn attribute(message: &[u8], fixed: usize, wanted: u16) -> Option<&[u8]> {
    values(message.get(HEADER_BYTES + fixed..)?, wanted).next()
}

fn number(stats: &[u8], at: usize) -> Option<u64> {
    let bytes = stats.get(at..)?.first_chunk()?;
    Some(u64::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(fixed: usize, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut message = RequestBytes::new(92, 0);
        message.push(&vec![0; fixed]);
        for (kind, value) in attributes {
            message.attribute(*kind, value);
        }
        message.finish()
    }

    #[test]
    fn attribute_is_found_behind_others_of_odd_length() {
        let answer = answer(12, &[(7, &[1, 2, 3]), (1, &[4, 5, 6, 7])]);
        assert_eq!(attribute(&answer, 12, 1), Some(&[4, 5, 6, 7][..]));
        assert_eq!(attribute(&answer, 12, 9), None);
    }

    #[test]
    fn attribute_is_found_in_another() {
        let number = 3_u32.to_ne_bytes();
        let mut data = RequestBytes::new(0, 0);
        data.attribute(IFLA_TUN_NUM_QUEUES, &number);
        let data = data.finish();
        let mut info = RequestBytes::new(0, 0);
        info.attribute(1, b"tun\0");
        info.attribute(IFLA_INFO_DATA, &data[HEADER_BYTES..]);
        let info = info.finish();
        let found = values(&info[HEADER_BYTES..], IFLA_INFO_DATA)
            .next()
            .unwrap();
        assert_eq!(values(found, IFLA_TUN_NUM_QUEUES).next(), Some(&number[..]));
        assert_eq!(values(found, 7).next(), None);
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..128)) {
            let _ = attribute(&bytes, 12, 1).and_then(|stats| number(stats, TX_DROPPED));
        }
    }
}
