//! Stream receivers: the multicast applications of the lab.

use std::{
    collections::HashMap,
    io::IoSliceMut,
    net::{Ipv6Addr, SocketAddrV6, UdpSocket},
    os::fd::{AsFd, AsRawFd as _},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use lab::{
    guest::{
        sys,
        wire::{Content, Filter, FromGuest, Join, ReceiverConfig, ReceiverStatus, Record},
    },
    probe::{
        clock, mpegts,
        payload::{STAMP_LEN, Stamp},
    },
};
use linux::multicast;
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{MsgFlags, MultiHeaders, SockaddrIn6, recvmmsg},
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::outbox::Outbox;

/// Size of the socket buffer, bytes: a second and more of the densest stream.
const RECEIVE_BUFFER: usize = 32 * 1024 * 1024;
/// Limit of datagrams per system call, and of records per frame.
const BATCH: usize = 128;
/// Shortest time between two reads of the socket, and thus the resolution of the time stamps. An
/// emulated CPU that reads every millisecond has no time left for anything else.
const FLUSH_INTERVAL: Duration = Duration::from_millis(4);
/// Interval at which a receiver without traffic checks for the request to stop, milliseconds.
const STOP_CHECK_MS: u16 = 100;

/// Running receivers by number.
pub(crate) struct Receivers {
    outbox: Arc<Outbox>,
    running: HashMap<u16, Receiver>,
}

struct Receiver {
    shared: Arc<Shared>,
    thread: thread::JoinHandle<()>,
    port: u16,
}

#[derive(Default)]
struct Shared {
    shall_stop: AtomicBool,
    datagrams: AtomicU64,
    foreign: AtomicU64,
}

impl Receivers {
    pub(crate) fn new(outbox: Arc<Outbox>) -> Self {
        Self {
            outbox,
            running: HashMap::new(),
        }
    }

    /// Joins all addresses, then starts to receive in a thread of its own.
    pub(crate) fn start(&mut self, number: u16, config: &ReceiverConfig) -> Result<()> {
        if self.running.contains_key(&number) {
            bail!("Receiver {number} is running already");
        }
        let socket = open(config)?;
        let shared = Arc::new(Shared::default());
        let thread = thread::spawn({
            let (shared, outbox) = (Arc::clone(&shared), Arc::clone(&self.outbox));
            let content = config.content;
            move || {
                if let Err(error) = sys::run_first() {
                    eprintln!("guest: Receiver {number} has no priority: {error}");
                }
                if let Err(error) = receive(number, &socket, content, &shared, &outbox) {
                    eprintln!("guest: Receiver {number} ended: {error:#}");
                }
            }
        });
        self.running.insert(
            number,
            Receiver {
                shared,
                thread,
                port: config.port,
            },
        );
        Ok(())
    }

    /// Stops a receiver and closes its socket, which leaves its multicast addresses.
    pub(crate) fn stop(&mut self, number: u16) -> Result<()> {
        let Some(receiver) = self.running.remove(&number) else {
            bail!("There is no receiver {number}");
        };
        receiver.shared.shall_stop.store(true, Relaxed);
        if receiver.thread.join().is_err() {
            bail!("Receiver {number} had crashed");
        }
        Ok(())
    }

    /// Returns the totals of the running receivers.
    pub(crate) fn status(&self) -> Vec<ReceiverStatus> {
        let mut status: Vec<_> = self
            .running
            .iter()
            .map(|(number, receiver)| ReceiverStatus {
                receiver: *number,
                datagrams: receiver.shared.datagrams.load(Relaxed),
                foreign: receiver.shared.foreign.load(Relaxed),
                overflowed: socket_drops(receiver.port),
            })
            .collect();
        status.sort_by_key(|status| status.receiver);
        status
    }
}

fn open(config: &ReceiverConfig) -> Result<UdpSocket> {
    let ifindex = if_nametoindex(config.interface.as_str())
        .with_context(|| format!("There is no interface {}", config.interface))?;
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.set_only_v6(true)?;
    socket.set_nonblocking(true)?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    multicast::receive_own_joins_only(&socket)?;
    socket
        .bind(&SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, config.port, 0, 0).into())
        .with_context(|| format!("Cannot bind to UDP port {}", config.port))?;
    for join in &config.joins {
        for multicast_address in join.addresses() {
            apply(&socket, ifindex, multicast_address, join)
                .with_context(|| format!("Cannot join {multicast_address}"))?;
        }
    }
    Ok(socket.into())
}

fn apply(socket: &Socket, ifindex: u32, multicast_address: Ipv6Addr, join: &Join) -> Result<()> {
    if let Filter::Include(sources) = &join.filter {
        for source in sources {
            multicast::join_source(socket, ifindex, multicast_address, *source)?;
        }
        return Ok(());
    }
    socket.join_multicast_v6(&multicast_address, ifindex)?;
    if let Filter::Exclude(sources) = &join.filter {
        for source in sources {
            multicast::block_source(socket, ifindex, multicast_address, *source)?;
        }
    }
    Ok(())
}

/// Receives until told to stop. Reports to the host at most once per [`FLUSH_INTERVAL`], except
/// after full batches.
fn receive(
    number: u16,
    socket: &UdpSocket,
    content: Content,
    shared: &Shared,
    outbox: &Outbox,
) -> Result<()> {
    // The kernel verifies the UDP checksum of a truncated datagram too, so a buffer for the stamp
    // is enough.
    let length = match content {
        Content::Stamped => STAMP_LEN,
        Content::MpegTs => 2048,
    };
    let mut buffers = vec![vec![0; length]; BATCH];
    let mut headers = MultiHeaders::<SockaddrIn6>::preallocate(BATCH, None);
    let mut transport = mpegts::Checker::default();
    let mut records = Vec::with_capacity(BATCH);
    while !shared.shall_stop.load(Relaxed) {
        let mut poll_fd = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut poll_fd, PollTimeout::from(STOP_CHECK_MS)) {
            Ok(0) | Err(Errno::EINTR) => continue,
            result => result?,
        };
        let mut slices: Vec<_> = buffers
            .iter_mut()
            .map(|buffer| [IoSliceMut::new(buffer)])
            .collect();
        let flags = MsgFlags::MSG_DONTWAIT;
        let received = match recvmmsg(
            socket.as_raw_fd(),
            &mut headers,
            slices.iter_mut(),
            flags,
            None,
        ) {
            Ok(results) => results.map(|message| message.bytes).collect::<Vec<_>>(),
            Err(Errno::EAGAIN | Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        let (received_ns, started) = (clock::now_ns(), Instant::now());
        for (buffer, bytes) in buffers.iter().zip(&received) {
            let datagram = buffer.get(..*bytes).unwrap_or_default();
            let is_ours = match content {
                Content::Stamped => Stamp::parse(datagram).map(|stamp| {
                    records.push(Record {
                        flow: stamp.flow,
                        sequence: stamp.sequence,
                    });
                }),
                Content::MpegTs => transport.handle_datagram(datagram).ok(),
            };
            if is_ours.is_none() {
                shared.foreign.fetch_add(1, Relaxed);
            }
        }
        shared.datagrams.fetch_add(received.len() as u64, Relaxed);
        match content {
            Content::Stamped if !records.is_empty() => {
                let batch = std::mem::replace(&mut records, Vec::with_capacity(BATCH));
                outbox.send_of(received_ns, &FromGuest::Records(number, batch))?;
            }
            Content::Stamped => {}
            Content::MpegTs => {
                let totals = transport.totals();
                outbox.send_of(received_ns, &FromGuest::Transport(number, totals))?;
            }
        }
        // A full batch means that more datagrams are waiting.
        if received.len() < BATCH {
            thread::sleep(FLUSH_INTERVAL.saturating_sub(started.elapsed()));
        }
    }
    Ok(())
}

/// Returns the drops of the sockets on a UDP port: the last column of `/proc/net/udp6`.
fn socket_drops(port: u16) -> u64 {
    let table = std::fs::read_to_string("/proc/net/udp6").unwrap_or_default();
    let suffix = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .filter(|line| {
            line.split_whitespace()
                .nth(1)
                .is_some_and(|local| local.ends_with(&suffix))
        })
        .filter_map(|line| line.split_whitespace().next_back()?.parse::<u64>().ok())
        .sum()
}
