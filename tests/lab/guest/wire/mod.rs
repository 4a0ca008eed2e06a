//! Messages between the host and the `guest` binary. [`mod@frame`] defines the frames that carry
//! them.
//!
//! Requests and replies are JSON. Messages about packets are binary, little endian, and as short as
//! possible.

pub mod frame;

use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use self::frame::{Frame, frame};
use crate::probe::counters::Counters;

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "org.roamcast.lab.0";

/// A request to the guest. The guest answers a repeated `id` again and executes it once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Id, unique over the life of the guest.
    pub id: u64,
    /// The command to execute.
    pub command: Command,
}

/// A command for the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Starts a program; its output follows as [`FromGuest::Output`], its end as
    /// [`FromGuest::Exit`], both under the id of this request.
    Run {
        /// Path, or name searched in `PATH`.
        program: String,
        /// Arguments without the program's name.
        args: Vec<String>,
    },
    /// Sends SIGTERM to the program that request `run` started.
    Terminate {
        /// Id of the request that started the program.
        run: u64,
    },
    /// Starts a receiver. The guest replies when the receiver has joined all addresses.
    StartReceiver {
        /// Number of the receiver, which its records carry.
        receiver: u16,
        /// Addresses to join, and the content of the datagrams.
        config: ReceiverConfig,
    },
    /// Stops a receiver, which leaves all its addresses. The guest replies when the receiver's
    /// socket is closed.
    StopReceiver {
        /// Number of the receiver.
        receiver: u16,
    },
    /// Starts to report stalls as [`FromGuest::Stall`]: a thread that sleeps a millisecond at a
    /// time detects that it did not run for longer.
    WatchStalls,
    /// Asks for a [`Status`].
    Status,
    /// Requests the frames `from..to` again. The guest sends no reply.
    Resend {
        /// First frame number.
        from: u32,
        /// One more than the last frame number.
        to: u32,
    },
}

/// Addresses that a receiver joins, and the content of the datagrams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverConfig {
    /// Interface to join on, e.g. `eth0`.
    pub interface: String,
    /// UDP destination port.
    pub port: u16,
    /// Multicast addresses to join, with their source filters.
    pub joins: Vec<Join>,
    /// Kind of the datagrams' content, which decides what the guest reports.
    pub content: Content,
}

/// Consecutive multicast addresses under one filter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// First multicast address.
    pub multicast_address: Ipv6Addr,
    /// Number of consecutive addresses, counted in the low 32 bits.
    pub count: u32,
    /// Sources to which the receiver listens.
    pub filter: Filter,
}

impl Join {
    /// Returns the join of one multicast address from any source.
    pub fn any_source(multicast_address: Ipv6Addr) -> Self {
        Self {
            multicast_address,
            count: 1,
            filter: Filter::Any,
        }
    }

    /// Returns the multicast addresses, in order.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv6Addr> {
        let first = self.multicast_address.to_bits();
        (0..self.count).map(move |index| {
            let low = (first as u32).wrapping_add(index);
            Ipv6Addr::from_bits((first & !u128::from(u32::MAX)) | u128::from(low))
        })
    }
}

/// Source filter of a join (RFC 9777 section 3).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Every source: EXCLUDE with an empty list.
    Any,
    /// Only these sources (SSM).
    Include(Vec<Ipv6Addr>),
    /// Every source but these.
    Exclude(Vec<Ipv6Addr>),
}

/// Kind of the content that a receiver expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// The probe's own stamps; the guest reports every packet.
    Stamped,
    /// MPEG-TS over UDP or RTP; the guest checks continuity counters and reports totals.
    MpegTs,
}

/// The guest's answer to a [`Request`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Id of the request.
    pub id: u64,
    /// Result of the command; the error is a sentence.
    pub result: Result<Answer, String>,
}

/// Data of a successful [`Reply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// No data.
    Done,
    /// The answer to [`Command::Status`].
    Status(Status),
}

/// State of the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Content of `/proc/sys/kernel/random/boot_id`, which changes with each boot.
    pub boot_id: String,
    /// Kernel release.
    pub kernel: String,
    /// Uptime of the guest in milliseconds; stands still while the guest is paused.
    pub uptime_ms: u64,
    /// Totals of all running receivers.
    pub receivers: Vec<ReceiverStatus>,
    /// Packet counters of the guest's kernel.
    pub counters: Counters,
}

/// Totals of one receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiverStatus {
    /// Number of the receiver.
    pub receiver: u16,
    /// Datagrams taken from the socket.
    pub datagrams: u64,
    /// Datagrams that do not match the expected content.
    pub foreign: u64,
    /// Datagrams that the kernel dropped because the socket's buffer was full.
    pub overflowed: u64,
}

/// One stamped packet that reached the application in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Flow of the stamp.
    pub flow: u16,
    /// Sequence number of the stamp.
    pub sequence: u32,
}

/// Totals of an MPEG-TS receiver since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportTotals {
    /// UDP datagrams that are valid MPEG-TS.
    pub datagrams: u64,
    /// 188-byte transport stream packets.
    pub packets: u64,
    /// Continuity-counter errors over all PIDs.
    pub continuity_errors: u64,
    /// Duplicate transport stream packets, which the standard allows once.
    pub duplicates: u64,
    /// Gaps in the RTP sequence numbers, if the stream is RTP.
    pub rtp_gaps: u64,
}

/// A message from the guest to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromGuest {
    /// The first frame after boot; carries the boot id.
    Hello(String),
    /// The answer to a request.
    Reply(Reply),
    /// Output of a program: request id, true for stderr, bytes.
    Output(u64, bool, Vec<u8>),
    /// End of a program: request id, exit code (128 + signal if it was killed).
    Exit(u64, i32),
    /// Number of a receiver, and the packets that it got since its last frame, in order.
    Records(u16, Vec<Record>),
    /// Number of an MPEG-TS receiver, and its totals.
    Transport(u16, TransportTotals),
    /// A thread that was ready to run did not run between these two times, in nanoseconds of the
    /// guest's monotonic clock.
    Stall(u64, u64),
    /// Sent after 100 ms without another message.
    Alive,
}

const KIND_REQUEST: u8 = 0x01;
const KIND_HELLO: u8 = 0x81;
const KIND_REPLY: u8 = 0x82;
const KIND_OUTPUT: u8 = 0x83;
const KIND_EXIT: u8 = 0x84;
const KIND_RECORDS: u8 = 0x85;
const KIND_TRANSPORT: u8 = 0x86;
const KIND_ALIVE: u8 = 0x87;
const KIND_STALL: u8 = 0x88;

const RECORD_LEN: usize = 6;

impl FromGuest {
    /// Returns kind and payload. The caller must split output and records that are longer than a
    /// frame.
    ///
    /// # Errors
    ///
    /// When JSON cannot express the reply.
    pub fn encode(&self) -> Result<(u8, Vec<u8>), serde_json::Error> {
        Ok(match self {
            Self::Hello(boot_id) => (KIND_HELLO, boot_id.as_bytes().to_vec()),
            Self::Reply(reply) => (KIND_REPLY, serde_json::to_vec(reply)?),
            Self::Output(id, is_stderr, bytes) => {
                let mut payload = id.to_le_bytes().to_vec();
                payload.push(u8::from(*is_stderr));
                payload.extend_from_slice(bytes);
                (KIND_OUTPUT, payload)
            }
            Self::Exit(id, code) => {
                let mut payload = id.to_le_bytes().to_vec();
                payload.extend(code.to_le_bytes());
                (KIND_EXIT, payload)
            }
            Self::Records(receiver, records) => {
                let mut payload = Vec::with_capacity(2 + records.len() * RECORD_LEN);
                payload.extend(receiver.to_le_bytes());
                for record in records {
                    payload.extend(record.flow.to_le_bytes());
                    payload.extend(record.sequence.to_le_bytes());
                }
                (KIND_RECORDS, payload)
            }
            Self::Transport(receiver, totals) => {
                let mut payload = receiver.to_le_bytes().to_vec();
                for total in [
                    totals.datagrams,
                    totals.packets,
                    totals.continuity_errors,
                    totals.duplicates,
                    totals.rtp_gaps,
                ] {
                    payload.extend(total.to_le_bytes());
                }
                (KIND_TRANSPORT, payload)
            }
            Self::Stall(from_ns, to_ns) => {
                let payload = [from_ns.to_le_bytes(), to_ns.to_le_bytes()].concat();
                (KIND_STALL, payload)
            }
            Self::Alive => (KIND_ALIVE, Vec::new()),
        })
    }

    /// Decodes a message; `None` if the frame is not a message of the guest.
    pub fn decode(frame: &Frame) -> Option<Self> {
        let mut rest = frame.payload.as_slice();
        Some(match frame.kind {
            KIND_HELLO => Self::Hello(String::from_utf8(frame.payload.clone()).ok()?),
            KIND_REPLY => Self::Reply(serde_json::from_slice(rest).ok()?),
            KIND_OUTPUT => {
                let id = u64::from_le_bytes(take(&mut rest)?);
                let [is_stderr] = take(&mut rest)?;
                Self::Output(id, is_stderr != 0, rest.to_vec())
            }
            KIND_EXIT => {
                let id = u64::from_le_bytes(take(&mut rest)?);
                Self::Exit(id, i32::from_le_bytes(take(&mut rest)?))
            }
            KIND_RECORDS => {
                let receiver = u16::from_le_bytes(take(&mut rest)?);
                let mut records = Vec::with_capacity(rest.len() / RECORD_LEN);
                while !rest.is_empty() {
                    records.push(Record {
                        flow: u16::from_le_bytes(take(&mut rest)?),
                        sequence: u32::from_le_bytes(take(&mut rest)?),
                    });
                }
                Self::Records(receiver, records)
            }
            KIND_TRANSPORT => {
                let receiver = u16::from_le_bytes(take(&mut rest)?);
                let mut next = || take(&mut rest).map(u64::from_le_bytes);
                Self::Transport(
                    receiver,
                    TransportTotals {
                        datagrams: next()?,
                        packets: next()?,
                        continuity_errors: next()?,
                        duplicates: next()?,
                        rtp_gaps: next()?,
                    },
                )
            }
            KIND_STALL => {
                let from_ns = u64::from_le_bytes(take(&mut rest)?);
                Self::Stall(from_ns, u64::from_le_bytes(take(&mut rest)?))
            }
            KIND_ALIVE => Self::Alive,
            _ => return None,
        })
    }
}

impl Request {
    /// Returns the request as a whole frame.
    ///
    /// # Errors
    ///
    /// When JSON cannot express the request.
    pub fn to_frame(&self) -> Result<Vec<u8>, serde_json::Error> {
        Ok(frame(KIND_REQUEST, 0, 0, &serde_json::to_vec(self)?))
    }

    /// Decodes a request; `None` if the frame is not a request.
    pub fn decode(frame: &Frame) -> Option<Self> {
        (frame.kind == KIND_REQUEST).then(|| serde_json::from_slice(&frame.payload).ok())?
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests;
