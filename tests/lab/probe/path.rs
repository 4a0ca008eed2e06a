//! Watches a stream at every interface of some nodes, which shows where on its path a packet was
//! lost or overtaken.
//!
//! ```text
//! router               VM host
//! sender --> site2 --> eth0 --> br0 --> gate --> vnet0 --> guest
//!    ^         ^         ^       ^                 ^
//!    '---------'---------'-------'-- the watch ----'
//! ```
//!
//! A packet socket receives what a TAP sends after the gate. Frames that an agent replays bypass
//! the qdisc and the packet sockets, so the watch does not see these frames on a TAP.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, anyhow};
use nix::errno::Errno;
use nix::net::if_::if_indextoname;
use nix::sys::socket::{LinkAddr, recvfrom};
use serde::{Deserialize, Serialize};
use socket2::{SockFilter, Socket, Type};

use super::clock;
use super::eavesdropper::all_packets;
use super::metrics::Window;
use super::payload::{STAMP_LEN, Stamp};
use crate::node::Node;

/// Length of the headers of IPv6 and UDP, bytes.
const HEADERS: usize = 48;
/// Bytes that the socket keeps of a packet.
const SNAP: usize = HEADERS + STAMP_LEN;
/// Size of the socket's buffer, bytes.
const BUFFER_BYTES: usize = 16 << 20;
/// Highest number of overtaken packets that a watch keeps.
const MOST_OVERTAKEN: usize = 10_000;
/// Number of packets of a flow that a watch follows: some hours at 20 Mbit/s.
const MOST_PACKETS: usize = 1 << 24;

/// Direction of a packet at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// The interface received the packet.
    In,
    /// The interface sent the packet.
    Out,
}

impl Direction {
    /// Returns the direction as text.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::In => "in",
            Self::Out => "out",
        }
    }
}

/// A packet that an interface received or sent after a packet of its flow with a higher number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overtaken {
    /// Name of the node.
    pub node: String,
    /// Name of the interface.
    pub interface: String,
    /// Direction of the packet.
    pub direction: Direction,
    /// Flow of the packet's stamp.
    pub flow: u16,
    /// Sequence number of the packet's stamp.
    pub sequence: u32,
    /// Highest sequence number of the flow that the interface had seen.
    pub highest: u32,
    /// Time at which the watch read the packet, in nanoseconds of the host's monotonic clock.
    pub at_ns: u64,
}

/// Passage of a flow through an interface in one direction.
#[derive(Debug, Default)]
struct Passage {
    node: String,
    interface: String,
    highest: u32,
    /// Whether each packet has passed, by its sequence number.
    passed: Vec<bool>,
}

impl Passage {
    /// Records a packet. Returns the highest number so far if that number is higher.
    fn take(&mut self, sequence: u32) -> Option<u32> {
        let index = sequence as usize;
        if index >= MOST_PACKETS {
            return None;
        }
        if index >= self.passed.len() {
            self.passed.resize(index + 1, false);
        }
        self.passed[index] = true;
        let overtaker = (sequence < self.highest).then_some(self.highest);
        self.highest = sequence.max(self.highest);
        overtaker
    }
}

/// Number of the node, index of the interface, direction, and flow.
type Place = (usize, usize, Direction, u16);

/// Everything that a watch has seen.
#[derive(Debug, Default)]
struct Seen {
    passages: BTreeMap<Place, Passage>,
    overtaken: Vec<Overtaken>,
}

/// A watch over several nodes for the time of one stream, since the numbers of a later stream begin
/// again. The drop of this value ends the watch.
pub struct PathWatch {
    shall_stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl PathWatch {
    /// Starts to watch all interfaces of `nodes`, also interfaces that appear later.
    ///
    /// # Errors
    ///
    /// When the kernel refuses a packet socket.
    pub fn start(nodes: impl IntoIterator<Item = Node>) -> Result<Self> {
        let mut watch = Self {
            shall_stop: Arc::default(),
            seen: Arc::default(),
            threads: Vec::new(),
        };
        for (number, node) in nodes.into_iter().enumerate() {
            let socket = node.within(open)?.context("Cannot listen to packets")?;
            let (stop, seen) = (Arc::clone(&watch.shall_stop), Arc::clone(&watch.seen));
            watch.threads.push(thread::spawn(move || {
                // Interfaces have their names in the node's namespace only.
                node.within(|| listen(&socket, (number, node.name()), &stop, &seen))?
            }));
        }
        Ok(watch)
    }

    /// Returns the packets of a window that were overtaken, in the order of time.
    ///
    /// # Errors
    ///
    /// When a thread of the watch has ended.
    pub fn overtaken(&self, window: Window) -> Result<Vec<Overtaken>> {
        let seen = self.seen()?;
        let overtaken = seen.overtaken.iter();
        let mut inside: Vec<_> = overtaken
            .filter(|it| window.contains(it.at_ns))
            .cloned()
            .collect();
        inside.sort_by_key(|it| it.at_ns);
        Ok(inside)
    }

    /// Returns the interfaces that a packet passed, as `node interface direction`, sorted.
    ///
    /// # Errors
    ///
    /// When a thread of the watch has ended.
    pub fn passed(&self, flow: u16, sequence: u32) -> Result<Vec<String>> {
        let seen = self.seen()?;
        let passages = seen.passages.iter().filter(|((.., of), passage)| {
            *of == flow && passage.passed.get(sequence as usize) == Some(&true)
        });
        let named = passages.map(|((_, _, direction, _), passage)| {
            let Passage {
                node, interface, ..
            } = passage;
            format!("{node} {interface} {}", direction.as_str())
        });
        let mut named: Vec<_> = named.collect();
        named.sort();
        Ok(named)
    }

    fn seen(&self) -> Result<MutexGuard<'_, Seen>> {
        if self.threads.iter().any(JoinHandle::is_finished) {
            return Err(anyhow!("The watch over the packets' path has ended"));
        }
        Ok(self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for PathWatch {
    fn drop(&mut self) {
        self.shall_stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Opens a socket that receives the first [`SNAP`] bytes of multicast UDP packets, from the IPv6
/// header on, of all interfaces in the namespace of the calling thread.
fn open() -> io::Result<Socket> {
    let socket = all_packets(Type::DGRAM, BUFFER_BYTES)?;
    let (load, is, end) = (
        (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16,
        (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
        (libc::BPF_RET | libc::BPF_K) as u16,
    );
    socket.attach_filter(&[
        // Next header.
        SockFilter::new(load, 0, 0, 6),
        SockFilter::new(is, 0, 3, libc::IPPROTO_UDP as u32),
        // First byte of the destination.
        SockFilter::new(load, 0, 0, 24),
        SockFilter::new(is, 0, 1, 0xff),
        SockFilter::new(end, 0, 0, SNAP as u32),
        SockFilter::new(end, 0, 0, 0),
    ])?;
    Ok(socket)
}

fn listen(
    socket: &Socket,
    (number, node): (usize, &str),
    shall_stop: &AtomicBool,
    seen: &Mutex<Seen>,
) -> Result<()> {
    let mut packet = [0; SNAP];
    while !shall_stop.load(Ordering::Relaxed) {
        let (length, from) = match recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut packet) {
            Ok((length, Some(from))) => (length, from),
            Ok((_, None)) | Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(error) => return Err(error).context("Cannot listen to packets any more"),
        };
        let stamp = packet.get(HEADERS..length).and_then(Stamp::parse);
        let Some(stamp) =
            stamp.filter(|_| u16::from_be(from.protocol()) == libc::ETH_P_IPV6 as u16)
        else {
            continue;
        };
        let direction = match from.pkttype() {
            libc::PACKET_OUTGOING => Direction::Out,
            _ => Direction::In,
        };
        let place = (number, from.ifindex(), direction, stamp.flow);
        let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
        let Seen {
            passages,
            overtaken,
        } = &mut *seen;
        let passage = passages.entry(place).or_insert_with(|| Passage {
            node: node.to_owned(),
            interface: name(from.ifindex()),
            ..Passage::default()
        });
        let Some(highest) = passage.take(stamp.sequence) else {
            continue;
        };
        if overtaken.len() < MOST_OVERTAKEN {
            overtaken.push(Overtaken {
                node: node.to_owned(),
                interface: passage.interface.clone(),
                direction,
                flow: stamp.flow,
                sequence: stamp.sequence,
                highest,
                at_ns: clock::now_ns(),
            });
        }
    }
    Ok(())
}

/// Returns the name of an interface in the namespace of the calling thread, or the index if the
/// interface is gone.
fn name(ifindex: usize) -> String {
    let name = u32::try_from(ifindex).ok().map(if_indextoname);
    match name {
        Some(Ok(name)) => name.to_string_lossy().into_owned(),
        _ => ifindex.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_behind_a_higher_number_is_overtaken() {
        let mut passage = Passage::default();
        let overtakers = [5, 7, 6, 7, 8].map(|sequence| passage.take(sequence));
        assert_eq!(overtakers, [None, None, Some(7), None, None]);
        assert_eq!(passage.passed[4..], [false, true, true, true, true]);
    }

    #[test]
    fn numbers_that_no_stream_reaches_need_no_memory() {
        let mut passage = Passage::default();
        assert_eq!(passage.take(u32::MAX), None);
        assert!(passage.passed.is_empty());
    }
}
