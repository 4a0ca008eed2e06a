//! MLD messages that a lab node sends and receives, in order, on all its interfaces.
//!
//! An AF_PACKET socket captures the frames; etherparse parses them instead of Roamcast's own
//! parser.

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use etherparse::{NetSlice, SlicedPacket};
use lab::node::Node;
use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

/// An address record of an MLDv2 Report (RFC 9777 §5.2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Record type, from 1 MODE_IS_INCLUDE to 6 BLOCK_OLD_SOURCES.
    pub kind: u8,
    /// Address that the record is about.
    pub multicast_address: Ipv6Addr,
    /// Number of listed sources.
    pub sources: usize,
}

impl Record {
    /// Returns true if the record requests all sources, as a state or as a change (IS_EX, TO_EX).
    pub fn joins(&self) -> bool {
        [2, 4].contains(&self.kind)
    }

    /// Returns true if the record ends all reception (TO_IN {}).
    pub fn leaves(&self) -> bool {
        self.kind == 3 && self.sources == 0
    }
}

/// Content of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Query for an address, or for all (`::`).
    Query(Ipv6Addr),
    /// MLDv2 Report with its records.
    Report(Vec<Record>),
}

/// A captured message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Name of the interface that the message passed.
    pub interface: String,
    /// IPv6 source of the packet.
    pub source: Ipv6Addr,
    /// What the packet says.
    pub message: Message,
}

impl Seen {
    /// Returns true for a Query of any version.
    pub fn is_query(&self) -> bool {
        matches!(self.message, Message::Query(_))
    }

    /// Returns the record for an address, if this is a Report with one.
    pub fn record(&self, multicast_address: Ipv6Addr) -> Option<&Record> {
        let Message::Report(records) = &self.message else {
            return None;
        };
        records
            .iter()
            .find(|record| record.multicast_address == multicast_address)
    }
}

/// A running capture.
pub struct MldCapture {
    seen: Arc<Mutex<Vec<Seen>>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl MldCapture {
    /// Captures on all interfaces of a node, including later ones.
    pub fn start(node: &Node) -> Self {
        let socket = node.within(|| open().expect("AF_PACKET socket")).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let reader = thread::spawn({
            let (node, seen, stop) = (node.clone(), Arc::clone(&seen), Arc::clone(&stop));
            move || {
                // Interface names belong to the namespace of the reading thread.
                node.within(|| read(&socket, &seen, &stop)).unwrap();
            }
        });
        Self {
            seen,
            stop,
            reader: Some(reader),
        }
    }

    /// Returns all messages so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

impl Drop for MldCapture {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn open() -> io::Result<Socket> {
    let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(protocol)))?;
    // The filter excludes the stream: it passes only IPv6 with Hop-by-Hop Options, which all MLD
    // messages have.
    socket.attach_filter(&[
        instruction(LOAD_HALF, 0, 0, 12),
        instruction(JUMP_EQUAL, 0, 3, 0x86dd),
        instruction(LOAD_BYTE, 0, 0, 20),
        instruction(JUMP_EQUAL, 0, 1, 0),
        instruction(RETURN, 0, 0, 0x4_0000),
        instruction(RETURN, 0, 0, 0),
    ])?;
    socket.set_recv_buffer_size(8 << 20)?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(socket)
}

const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const JUMP_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

fn instruction(code: u32, if_true: u8, if_false: u8, value: u32) -> SockFilter {
    SockFilter::new(code as u16, if_true, if_false, value)
}

fn read(socket: &Socket, seen: &Mutex<Vec<Seen>>, stop: &AtomicBool) {
    let mut frame = vec![0; 1 << 16];
    while !stop.load(Ordering::Relaxed) {
        let Ok((length, Some(from))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame) else {
            continue;
        };
        let Some((source, message)) = parse(&frame[..length]) else {
            continue;
        };
        let interface = nix::net::if_::if_indextoname(from.ifindex() as u32).map_or_else(
            |_| from.ifindex().to_string(),
            |name| name.to_string_lossy().into(),
        );
        seen.lock().unwrap().push(Seen {
            interface,
            source,
            message,
        });
    }
}

fn parse(frame: &[u8]) -> Option<(Ipv6Addr, Message)> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let Some(NetSlice::Ipv6(ip)) = packet.net else {
        return None;
    };
    let source = ip.header().source_addr();
    let body = ip.payload().payload;
    let address = |offset: usize| -> Option<Ipv6Addr> {
        let bytes: [u8; 16] = body.get(offset..offset + 16)?.try_into().ok()?;
        Some(Ipv6Addr::from(bytes))
    };
    let half = |offset: usize| -> Option<usize> {
        let bytes = body.get(offset..offset + 2)?.try_into().ok()?;
        Some(usize::from(u16::from_be_bytes(bytes)))
    };
    let message = match body.first()? {
        130 => Message::Query(address(8)?),
        143 => {
            let mut offset = 8;
            let mut records = Vec::new();
            for _ in 0..half(6)? {
                let sources = half(offset + 2)?;
                records.push(Record {
                    kind: *body.get(offset)?,
                    multicast_address: address(offset + 4)?,
                    sources,
                });
                offset += 20 + 16 * sources + 4 * usize::from(*body.get(offset + 1)?);
            }
            Message::Report(records)
        }
        _ => return None,
    };
    Some((source, message))
}
