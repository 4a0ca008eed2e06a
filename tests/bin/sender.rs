//! Sends the probe's multicast stream: stamped, evenly spaced packets to one or many addresses.
//!
//! Pacing uses absolute deadlines, so a late packet does not shift the packets after it. The
//! program ends on SIGTERM, on SIGINT or after `--duration`, and then prints a summary as JSON.
//!
//! SIGUSR1 makes the sender rest: it prints the number of packets sent so far, and continues on
//! SIGUSR2. The guest can thus count the packets between two rests even if nothing distinguishes
//! them.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    net::{Ipv6Addr, SocketAddrV6},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use lab::{
    guest::wire::Join,
    probe::{
        clock,
        log::Sent,
        mpegts,
        payload::{STAMP_LEN, Stamp},
        report::{FlowSent, Rest, SenderSummary},
    },
};
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::{
        signal::{SigSet, Signal},
        time::TimeSpec,
    },
    time::{ClockId, ClockNanosleepFlags, clock_nanosleep},
};
use socket2::{Domain, Protocol, Socket, Type};

/// Sends stamped multicast packets at a constant rate.
#[derive(Parser)]
struct Args {
    /// Multicast address of the first flow; further flows take the addresses that follow.
    multicast_address: Ipv6Addr,
    /// UDP destination port.
    #[arg(long, default_value_t = 5004)]
    port: u16,
    /// Number of flows, served in turn.
    #[arg(long, default_value_t = 1)]
    flows: u16,
    /// Number of the first flow in stamps and in the log.
    #[arg(long, default_value_t = 0)]
    first_flow: u16,
    /// Send datagrams of seven MPEG-TS null packets without a stamp, all of them equal.
    #[arg(long, conflicts_with = "size")]
    null_packets: bool,
    /// Interface to send from.
    #[arg(long)]
    interface: String,
    /// Packets per second over all flows.
    #[arg(long, default_value_t = 1725.0)]
    rate: f64,
    /// UDP payload, bytes.
    #[arg(long, default_value_t = 1450)]
    size: usize,
    /// Hop limit.
    #[arg(long, default_value_t = 32)]
    hop_limit: u32,
    /// Duration of the stream, seconds; without it the stream lasts until SIGTERM.
    #[arg(long)]
    duration: Option<f64>,
    /// File for the send time of each packet (14 bytes per packet).
    #[arg(long)]
    log: Option<PathBuf>,
}

/// TS packets per datagram with `--null-packets`.
const NULL_PACKETS: usize = 7;

static SHALL_STOP: AtomicBool = AtomicBool::new(false);
static SHALL_REST: AtomicBool = AtomicBool::new(false);

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.flows > 0, "The number of flows must be at least 1");
    ensure!(
        args.rate.is_finite() && args.rate > 0.0,
        "The rate must be more than 0 packets per second"
    );
    ensure!(
        (STAMP_LEN..=65_000).contains(&args.size),
        "The size must be from {STAMP_LEN} to 65000 bytes"
    );
    ensure!(
        args.multicast_address.is_multicast(),
        "{} is no multicast address",
        args.multicast_address
    );
    take_signals()?;
    let summary = send(&args)?;
    println!("{}", serde_json::to_string(&summary)?);
    Ok(())
}

/// Starts a thread that waits for the signals, so no handler runs and no signal interrupts a system
/// call.
fn take_signals() -> Result<()> {
    let signals: SigSet = [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ]
    .into_iter()
    .collect();
    signals.thread_block().context("Cannot block signals")?;
    std::thread::spawn(move || {
        loop {
            match signals.wait() {
                Ok(Signal::SIGUSR1) => SHALL_REST.store(true, Relaxed),
                Ok(Signal::SIGUSR2) => SHALL_REST.store(false, Relaxed),
                Ok(_) => SHALL_STOP.store(true, Relaxed),
                Err(_) => {}
            }
        }
    });
    Ok(())
}

/// Prints the number of sent packets and waits until the sender may continue. Returns the time of
/// the wait, nanoseconds.
fn rest(sent: u64) -> Result<u64> {
    let started_ns = clock::now_ns();
    println!("{}", serde_json::to_string(&Rest { sent })?);
    std::io::stdout().flush()?;
    while SHALL_REST.load(Relaxed) && !SHALL_STOP.load(Relaxed) {
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(clock::now_ns() - started_ns)
}

fn send(args: &Args) -> Result<SenderSummary> {
    let ifindex = if_nametoindex(args.interface.as_str())
        .with_context(|| format!("There is no interface {}", args.interface))?;
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_multicast_if_v6(ifindex)?;
    socket.set_multicast_hops_v6(args.hop_limit)?;
    socket.set_multicast_loop_v6(false)?;
    let join = Join {
        count: u32::from(args.flows),
        ..Join::any_source(args.multicast_address)
    };
    let destinations: Vec<_> = join
        .addresses()
        .map(|address| SocketAddrV6::new(address, args.port, 0, ifindex).into())
        .collect();
    let mut log = match &args.log {
        Some(path) => {
            let file =
                File::create(path).with_context(|| format!("Cannot create {}", path.display()))?;
            Some(BufWriter::with_capacity(1 << 16, file))
        }
        None => None,
    };
    let mut flows: Vec<_> = join
        .addresses()
        .zip(args.first_flow..)
        .map(|(multicast_address, flow)| FlowSent {
            flow,
            multicast_address,
            ..Default::default()
        })
        .collect();
    let mut datagram = match args.null_packets {
        true => mpegts::null_packet().repeat(NULL_PACKETS),
        false => vec![0; args.size],
    };
    let (start_ns, mut failed) = (clock::now_ns(), 0);
    let mut rested_ns = 0;
    let limit = args.duration.map(Duration::from_secs_f64);
    let mut last_ns = start_ns;
    for packet in 0u64.. {
        let offset = Duration::from_secs_f64(packet as f64 / args.rate);
        if SHALL_STOP.load(Relaxed) || limit.is_some_and(|limit| offset >= limit) {
            break;
        }
        if SHALL_REST.load(Relaxed) {
            rested_ns += rest(packet)?;
        }
        sleep_until(start_ns + rested_ns + u64::try_from(offset.as_nanos())?)?;
        let index = (packet % u64::from(args.flows)) as usize;
        let (Some(flow), Some(destination)) = (flows.get_mut(index), destinations.get(index))
        else {
            break;
        };
        let sent_ns = clock::now_ns();
        let (number, sequence) = (flow.flow, flow.sent as u32);
        if !args.null_packets {
            let stamp = Stamp {
                flow: number,
                sequence,
                sent_ns,
            };
            datagram[..STAMP_LEN].copy_from_slice(&stamp.to_bytes());
        }
        // A packet that the kernel refuses (no buffers, link down) keeps its number, because it was
        // due.
        if socket.send_to(&datagram, destination).is_err() {
            failed += 1;
        }
        flow.sent += 1;
        last_ns = sent_ns;
        if let Some(log) = &mut log {
            log.write_all(
                &Sent {
                    flow: number,
                    sequence,
                    sent_ns,
                }
                .to_bytes(),
            )?;
        }
    }
    if let Some(log) = &mut log {
        log.flush().context("Cannot write the log")?;
    }
    Ok(SenderSummary {
        rate_pps: args.rate,
        payload_bytes: datagram.len(),
        start_ns,
        last_ns,
        failed,
        flows,
    })
}

fn sleep_until(deadline_ns: u64) -> Result<()> {
    let seconds = i64::try_from(deadline_ns / 1_000_000_000)?;
    let nanoseconds = i64::try_from(deadline_ns % 1_000_000_000)?;
    let deadline = TimeSpec::new(seconds, nanoseconds);
    let flags = ClockNanosleepFlags::TIMER_ABSTIME;
    match clock_nanosleep(ClockId::CLOCK_MONOTONIC, flags, &deadline) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error).context("Cannot sleep"),
    }
}
