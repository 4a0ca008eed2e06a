//! The sender's stream and the guest's receiver.

use std::fs;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{STREAM_ADDRESS, STREAM_PORT, Testbed};
use crate::guest::wire::{Content, Filter, Join, ReceiverConfig};
use crate::node::Process;
use crate::probe::ffmpeg::{DATAGRAM_LEN, FfmpegStream, Packing};
use crate::probe::log::{self, Sent};
use crate::{Lab, binaries};

/// How long a stream is watched before and after something happens to it.
pub const STREAM_TIME: Duration = Duration::from_secs(1);
/// UDP payload of each packet, bytes: the paper's.
pub const PAYLOAD_BYTES: u32 = 1450;

/// Who sends, and how its packets are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamKind {
    /// Stamped packets; each is accounted for.
    Probe,
    /// MPEG-TS by ffmpeg; continuity-counter errors are counted in the guest.
    Ffmpeg(Packing),
}

/// What is sent.
#[derive(Clone, Copy, Debug)]
pub struct StreamConfig {
    /// Rate over all flows, Mbit/s of UDP payload.
    pub rate_mbps: f64,
    /// Number of flows, on consecutive addresses from [`STREAM_ADDRESS`] on; 1 for ffmpeg.
    pub flows: u16,
    /// Who sends.
    pub kind: StreamKind,
}

impl StreamConfig {
    /// Packets per second over all flows.
    pub fn packets_per_second(&self) -> f64 {
        let payload = match self.kind {
            StreamKind::Probe => PAYLOAD_BYTES,
            StreamKind::Ffmpeg(_) => DATAGRAM_LEN,
        };
        self.rate_mbps * 1e6 / (f64::from(payload) * 8.0)
    }

    /// What the guest expects in the datagrams.
    pub fn content(&self) -> Content {
        match self.kind {
            StreamKind::Probe => Content::Stamped,
            StreamKind::Ffmpeg(_) => Content::MpegTs,
        }
    }
}

/// A running stream. Dropping it ends it.
pub struct Stream {
    process: Process,
    /// Of the probe only.
    log: Option<PathBuf>,
}

impl Stream {
    /// Starts sending.
    ///
    /// # Errors
    ///
    /// When the sender is not built or ends at once.
    pub fn start(lab: &Lab, config: &StreamConfig) -> Result<Self> {
        let sender = lab.sender();
        let log = sender.log_path("stream").with_extension("bin");
        if log.exists() {
            fs::remove_file(&log).context("Failed to remove an old log of the sender")?;
        }
        if let StreamKind::Ffmpeg(packing) = config.kind {
            let stream = FfmpegStream {
                multicast_address: STREAM_ADDRESS,
                port: STREAM_PORT,
                packing,
                rate_kbps: (config.rate_mbps * 1e3) as u32,
                hop_limit: 32,
            };
            let mut command = sender.command("ffmpeg");
            command.args(stream.arguments());
            let process = sender.spawn("stream", command)?;
            return Ok(Self { process, log: None });
        }
        let mut command = sender.command(binaries::path("sender")?);
        command
            .arg(STREAM_ADDRESS.to_string())
            .args(["--interface", "eth0"])
            .arg("--port")
            .arg(STREAM_PORT.to_string())
            .arg("--flows")
            .arg(config.flows.to_string())
            .arg("--rate")
            .arg(config.packets_per_second().to_string())
            .arg("--size")
            .arg(PAYLOAD_BYTES.to_string())
            .arg("--log")
            .arg(&log);
        let process = sender.spawn("stream", command)?;
        Ok(Self {
            process,
            log: Some(log),
        })
    }

    /// Ends the stream and returns every packet sent; ffmpeg's are not known.
    ///
    /// # Errors
    ///
    /// When the sender failed; the text holds what it printed.
    pub fn stop(self) -> Result<Vec<Sent>> {
        let path = self.process.log().to_owned();
        let status = self.process.terminate(Duration::from_secs(5))?;
        let Some(log) = self.log else {
            // ffmpeg ends with 255 when it is told to.
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

/// Number of the guest's receiver for [`STREAM_ADDRESS`].
pub const RECEIVER: u16 = 1;

/// Returns what the guest joins to receive all flows of a stream.
pub fn receiver(config: &StreamConfig) -> ReceiverConfig {
    ReceiverConfig {
        interface: "eth0".to_owned(),
        port: STREAM_PORT,
        joins: vec![Join {
            multicast_address: STREAM_ADDRESS,
            count: u32::from(config.flows),
            filter: Filter::Any,
        }],
        content: config.content(),
    }
}

/// Waits until the agent of the first VM host knows all addresses that the guest joined.
///
/// # Errors
///
/// When it does not in time.
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
