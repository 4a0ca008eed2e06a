//! Streams: the sender's packets and the guest's joins.
//!
//! A guest may receive several [`Streams`] at once. The index of a stream determines its multicast
//! addresses, flow numbers, sender and receiver. A stream may be source-specific.

use std::fs;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use super::{STREAM_ADDRESS, STREAM_PORT, Testbed};
use crate::guest::wire::{Content, Filter, Join, ReceiverConfig};
use crate::node::Process;
use crate::probe::ffmpeg::{DATAGRAM_LEN, FfmpegStream, Packing};
use crate::probe::log::{self, Sent};
use crate::probe::report::Rest;
use crate::topology::SENDER_ADDRESS;
use crate::{Lab, binaries, wait};

/// Time of the measurement before and after an event.
pub const STREAM_TIME: Duration = Duration::from_secs(1);
/// UDP payload of each packet, bytes, as in the paper.
pub const PAYLOAD_BYTES: u32 = 1450;
/// First address of source-specific streams, in the range that hosts may choose from (RFC 4607
/// section 1).
const SOURCE_SPECIFIC_ADDRESS: Ipv6Addr = Ipv6Addr::new(0xff3e, 0, 0, 0, 0, 0, 0x8000, 0x1);
/// Distance between the first addresses of two streams, and limit of the flows of one stream.
const ADDRESSES: u16 = 0x1000;
/// Highest number of streams: flow numbers have 16 bits, and each stream takes 2^12 numbers.
const STREAMS: u16 = 16;
/// Default interface of the guest's joins.
const NIC: &str = "eth0";
/// Longest time until the sender confirms a pause.
const REST: Duration = Duration::from_secs(5);

/// Sender of a stream, and how its packets are distinguished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    /// Stamped packets; each is accounted for.
    Probe,
    /// MPEG-TS by ffmpeg; continuity-counter errors are counted in the guest.
    Ffmpeg(Packing),
    /// MPEG-TS null packets, seven in a datagram: all datagrams are identical and are only counted.
    Identical,
}

/// Parameters of a stream.
#[derive(Clone, Copy, Debug)]
pub struct StreamConfig {
    /// Rate over all flows, Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// Number of flows, on consecutive addresses; 1 for ffmpeg.
    pub flows: u16,
    /// Sender of the stream, and how its packets are distinguished.
    pub kind: StreamKind,
}

impl StreamConfig {
    /// Returns the configuration of one flow of stamped packets.
    pub const fn probe(rate_mbps: f64) -> Self {
        Self {
            rate_mbps,
            flows: 1,
            kind: StreamKind::Probe,
        }
    }

    /// Returns the packets per second over all flows.
    pub fn packets_per_second(&self) -> f64 {
        let payload = match self.kind {
            StreamKind::Probe => PAYLOAD_BYTES,
            StreamKind::Ffmpeg(_) | StreamKind::Identical => DATAGRAM_LEN,
        };
        self.rate_mbps * 1e6 / (f64::from(payload) * 8.0)
    }

    /// Returns the content that the guest expects.
    pub fn content(&self) -> Content {
        match self.kind {
            StreamKind::Probe => Content::Stamped,
            StreamKind::Ffmpeg(_) | StreamKind::Identical => Content::MpegTs,
        }
    }
}

/// Sources to which the guest listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Service {
    /// Every source: any-source multicast (ASM).
    #[default]
    AnySource,
    /// The lab's sender only (SSM, RFC 4607).
    SourceSpecific,
}

/// A stream with its index, from which addresses and flow numbers follow.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// Parameters of the stream.
    pub config: StreamConfig,
    /// Sources to which the guest listens.
    pub service: Service,
    /// Index of the stream, from 0.
    pub index: u16,
    /// Interface of the guest's join.
    pub interface: &'static str,
}

impl From<&StreamConfig> for Placed {
    /// Places a single stream at index 0.
    fn from(config: &StreamConfig) -> Self {
        Self {
            config: *config,
            service: Service::AnySource,
            index: 0,
            interface: NIC,
        }
    }
}

impl Placed {
    /// Sets the interface of the guest's join.
    #[must_use]
    pub fn on(self, interface: &'static str) -> Self {
        Self { interface, ..self }
    }

    /// Returns the first multicast address.
    pub fn multicast_address(&self) -> Ipv6Addr {
        let first = match self.service {
            Service::AnySource => STREAM_ADDRESS,
            Service::SourceSpecific => SOURCE_SPECIFIC_ADDRESS,
        };
        Ipv6Addr::from_bits(first.to_bits() + u128::from(self.index) * u128::from(ADDRESSES))
    }

    /// Returns the number of the first flow, in stamps and in the sender's log.
    pub fn first_flow(&self) -> u16 {
        self.index * ADDRESSES
    }

    /// Returns the number of the guest's receiver.
    pub fn receiver_number(&self) -> u16 {
        RECEIVER + self.index
    }

    /// Returns the joins for all flows of the stream.
    pub fn receiver(&self) -> ReceiverConfig {
        ReceiverConfig {
            interface: self.interface.to_owned(),
            port: STREAM_PORT,
            joins: vec![self.join()],
            content: self.config.content(),
        }
    }

    /// Returns all multicast addresses.
    pub fn addresses(&self) -> Vec<Ipv6Addr> {
        self.join().addresses().collect()
    }

    fn join(&self) -> Join {
        Join {
            multicast_address: self.multicast_address(),
            count: u32::from(self.config.flows),
            filter: match self.service {
                Service::AnySource => Filter::Any,
                Service::SourceSpecific => Filter::Include(vec![SENDER_ADDRESS]),
            },
        }
    }
}

/// The streams of one guest.
#[derive(Clone, Debug)]
pub struct Streams(Vec<Placed>);

impl From<StreamConfig> for Streams {
    fn from(config: StreamConfig) -> Self {
        Self(vec![Placed::from(&config)])
    }
}

impl Streams {
    /// Places streams from index `from` on. Streams with the same index are one stream.
    ///
    /// # Errors
    ///
    /// When there is no stream, a stream has more flows than addresses, or the last index is too
    /// high.
    pub fn placed(from: u16, streams: &[(StreamConfig, Service)]) -> Result<Self> {
        ensure!(!streams.is_empty(), "A guest needs a stream");
        ensure!(
            usize::from(from) + streams.len() <= usize::from(STREAMS),
            "There are at most {STREAMS} streams"
        );
        for (config, _) in streams {
            ensure!(
                config.flows <= ADDRESSES,
                "A stream has at most {ADDRESSES} flows"
            );
        }
        let place = |(index, (config, service)): (u16, &(StreamConfig, Service))| Placed {
            config: *config,
            service: *service,
            index,
            interface: NIC,
        };
        Ok(Self((from..).zip(streams).map(place).collect()))
    }

    /// Sets the interface of the guest's joins.
    #[must_use]
    pub fn on(self, interface: &'static str) -> Self {
        Self(self.0.into_iter().map(|it| it.on(interface)).collect())
    }

    /// Returns the streams in the order of their indexes.
    pub fn iter(&self) -> impl Iterator<Item = &Placed> {
        self.0.iter()
    }

    /// Returns the rate of all streams together, Mbit/s of UDP payload.
    pub fn rate_mbps(&self) -> f64 {
        self.iter().map(|stream| stream.config.rate_mbps).sum()
    }

    /// Returns every multicast address to which the guest listens.
    pub fn addresses(&self) -> Vec<Ipv6Addr> {
        self.iter().flat_map(Placed::addresses).collect()
    }
}

/// A running stream. The drop of this value ends the stream.
pub struct Stream {
    process: Process,
    /// Log of the lab's own sender; `None` for ffmpeg.
    log: Option<PathBuf>,
}

impl Stream {
    /// Starts the sender of a stream: `ffmpeg`, or the lab's own `sender`.
    ///
    /// # Errors
    ///
    /// When the sender is not built or ends at once.
    pub fn start(lab: &Lab, stream: impl Into<Placed>) -> Result<Self> {
        let stream = stream.into();
        let config = &stream.config;
        let sender = lab.sender();
        let label = format!("stream{}", stream.index + 1);
        let log = sender.log_path(&label).with_extension("bin");
        for old in [&log, &sender.log_path(&label)] {
            if old.exists() {
                fs::remove_file(old).context("Failed to remove an old log of the sender")?;
            }
        }
        if let StreamKind::Ffmpeg(packing) = config.kind {
            let stream = FfmpegStream {
                multicast_address: stream.multicast_address(),
                port: STREAM_PORT,
                packing,
                rate_kbps: (config.rate_mbps * 1e3) as u32,
                hop_limit: 32,
            };
            let mut command = sender.command("ffmpeg");
            command.args(stream.arguments());
            let process = sender.spawn(&label, command)?;
            return Ok(Self { process, log: None });
        }
        let mut command = sender.command(binaries::path("sender")?);
        command
            .arg(stream.multicast_address().to_string())
            .args(["--interface", "eth0"])
            .arg("--port")
            .arg(STREAM_PORT.to_string())
            .arg("--flows")
            .arg(config.flows.to_string())
            .arg("--first-flow")
            .arg(stream.first_flow().to_string())
            .arg("--rate")
            .arg(config.packets_per_second().to_string())
            .arg("--log")
            .arg(&log);
        match config.kind {
            StreamKind::Identical => command.arg("--null-packets"),
            _ => command.arg("--size").arg(PAYLOAD_BYTES.to_string()),
        };
        let process = sender.spawn(&label, command)?;
        Ok(Self {
            process,
            log: Some(log),
        })
    }

    /// Pauses the lab's own sender. Returns the number of packets sent.
    ///
    /// # Errors
    ///
    /// When the sender does not confirm the pause.
    pub fn rest(&self) -> Result<u64> {
        let rests = || {
            let printed = self.process.printed();
            let lines = printed.lines().map(serde_json::from_str::<Rest>);
            lines.filter_map(Result::ok).collect::<Vec<_>>()
        };
        let before = rests().len();
        self.process.signal(Signal::SIGUSR1)?;
        let rest = wait::until("the sender to rest", REST, || rests().get(before).copied())?;
        Ok(rest.sent)
    }

    /// Resumes the lab's own sender after [`Stream::rest`].
    ///
    /// # Errors
    ///
    /// When the sender has ended.
    pub fn resume(&self) -> Result<()> {
        self.process.signal(Signal::SIGUSR2)
    }

    /// Ends the stream and returns every packet sent; nothing for ffmpeg, which keeps no log.
    ///
    /// # Errors
    ///
    /// When the sender failed; the text holds its output.
    pub fn stop(self) -> Result<Vec<Sent>> {
        let path = self.process.log().to_owned();
        let status = self.process.terminate(Duration::from_secs(5))?;
        let Some(log) = self.log else {
            // ffmpeg exits with 255 after SIGTERM, so its status says nothing.
            return Ok(Vec::new());
        };
        ensure!(
            status.success(),
            "The sender failed: {}",
            fs::read_to_string(path).unwrap_or_default()
        );
        log::read(&log)
    }
}

/// Number of the guest's receiver for the first stream.
pub const RECEIVER: u16 = 1;

/// Returns the configuration of a guest's receiver for all flows of a stream.
pub fn receiver(stream: impl Into<Placed>) -> ReceiverConfig {
    stream.into().receiver()
}

/// Waits until the agent of the first VM host knows `addresses` multicast addresses of any-source
/// streams.
///
/// # Errors
///
/// When the agent does not know the addresses in time.
pub fn wait_snooped(testbed: &mut Testbed, addresses: u16) -> Result<()> {
    let vms1 = testbed.lab().vms1().clone();
    let agents = testbed.agents()?;
    crate::wait::until(
        "the agent to know what the guest listens to",
        Duration::from_secs(20),
        || {
            let listeners = agents.query(&vms1, "listeners").ok()?;
            let known = listeners
                .as_array()?
                .iter()
                .filter_map(|row| row["multicast_address"].as_str()?.parse::<Ipv6Addr>().ok())
                .filter(|address| {
                    address
                        .segments()
                        .starts_with(&STREAM_ADDRESS.segments()[..6])
                })
                .count();
            (known == usize::from(addresses)).then_some(())
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_share_no_address_and_no_flow_number() {
        let config = StreamConfig {
            flows: 3,
            ..StreamConfig::probe(2.0)
        };
        let services = [
            (config, Service::AnySource),
            (config, Service::AnySource),
            (config, Service::SourceSpecific),
        ];
        let streams = Streams::placed(1, &services).unwrap();
        let mut addresses = streams.addresses();
        assert_eq!(addresses.len(), 9);
        assert_eq!(addresses[0].to_string(), "ff1e::4000:1001");
        assert_eq!(addresses[8].to_string(), "ff3e::8000:3003");
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), 9);
        let flows: Vec<_> = streams.iter().map(Placed::first_flow).collect();
        assert_eq!(flows, [0x1000, 0x2000, 0x3000]);
    }

    #[test]
    fn stream_without_a_flow_number_left_is_refused() {
        let config = StreamConfig {
            flows: ADDRESSES + 1,
            ..StreamConfig::probe(2.0)
        };
        assert!(Streams::placed(0, &[(config, Service::AnySource)]).is_err());
        let config = StreamConfig::probe(2.0);
        assert!(Streams::placed(STREAMS, &[(config, Service::AnySource)]).is_err());
    }
}
