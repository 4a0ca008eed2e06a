//! Traffic of a real player: ffmpeg sends a test picture as MPEG-TS over UDP or RTP.

use std::net::Ipv6Addr;

/// Encapsulation of the transport stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Seven TS packets in each UDP datagram.
    Udp,
    /// Seven TS packets behind an RTP header (RFC 2250) in each UDP datagram.
    Rtp,
}

/// Parameters of a stream that ffmpeg sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FfmpegStream {
    /// Multicast address to send to; the sender's route decides the interface.
    pub multicast_address: Ipv6Addr,
    /// UDP destination port.
    pub port: u16,
    /// Encapsulation of the transport stream.
    pub packing: Packing,
    /// Rate of the transport stream in kbit/s, kept constant by null packets.
    pub rate_kbps: u32,
    /// Hop limit of the packets; each router between sender and guest takes one.
    pub hop_limit: u8,
}

/// Bytes of transport stream in a datagram: seven packets of 188 bytes.
pub const DATAGRAM_LEN: u32 = 1316;

impl FfmpegStream {
    /// Returns the arguments for `ffmpeg`, which then sends until it gets SIGTERM.
    pub fn arguments(&self) -> Vec<String> {
        let Self {
            multicast_address,
            port,
            rate_kbps,
            hop_limit,
            ..
        } = self;
        let (format, scheme) = match self.packing {
            Packing::Udp => ("mpegts", "udp"),
            Packing::Rtp => ("rtp_mpegts", "rtp"),
        };
        // The picture gets half of the rate, whatever it shows, and null packets fill the rest.
        let video_kbps = rate_kbps / 2;
        let mut arguments: Vec<String> = format!(
            "-nostdin -hide_banner -loglevel error -re -f lavfi -i testsrc2=size=320x240:rate=25 \
             -c:v mpeg2video -g 12 -b:v {video_kbps}k -maxrate {video_kbps}k -bufsize {video_kbps}k \
             -threads 1"
        )
        .split_whitespace()
        .map(str::to_owned)
        .collect();
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        let bits = format!("{}", u64::from(*rate_kbps) * 1000);
        match self.packing {
            Packing::Udp => option("-muxrate", bits.clone()),
            Packing::Rtp => option("-mpegts_muxer_options", format!("muxrate={bits}")),
        }
        option("-f", format.to_owned());
        // By default ffmpeg sends a whole picture at once; `bitrate` spaces the datagrams evenly.
        let pacing = match self.packing {
            Packing::Udp => format!("&bitrate={bits}&burst_bits={}", DATAGRAM_LEN * 8 * 4),
            Packing::Rtp => String::new(),
        };
        arguments.push(format!(
            "{scheme}://[{multicast_address}]:{port}?pkt_size={DATAGRAM_LEN}&ttl={hop_limit}{pacing}"
        ));
        arguments
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::UdpSocket,
        process::{Command, Stdio},
        time::{Duration, Instant},
    };

    use super::*;
    use crate::probe::mpegts;

    /// Receives from ffmpeg on the loopback address and checks the datagrams.
    fn totals_of(packing: Packing) -> Option<crate::guest::wire::TransportTotals> {
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        socket
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let stream = FfmpegStream {
            multicast_address: Ipv6Addr::LOCALHOST,
            port: socket.local_addr().unwrap().port(),
            packing,
            rate_kbps: 2000,
            hop_limit: 32,
        };
        let child = Command::new("ffmpeg")
            .args(stream.arguments())
            .stdin(Stdio::null())
            .spawn();
        let Ok(mut child) = child else {
            assert!(std::env::var_os("CI").is_none(), "ffmpeg is missing");
            println!("skipped: ffmpeg is not installed");
            return None;
        };
        let mut checker = mpegts::Checker::default();
        let mut buffer = [0; 2048];
        let deadline = Instant::now() + Duration::from_secs(60);
        while checker.totals().datagrams < 200 && Instant::now() < deadline {
            let length = socket.recv(&mut buffer).unwrap();
            checker.handle_datagram(&buffer[..length]).unwrap();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        Some(checker.totals())
    }

    #[test]
    fn ffmpeg_over_udp_has_no_continuity_errors() {
        let Some(totals) = totals_of(Packing::Udp) else {
            return;
        };
        assert_eq!((totals.datagrams, totals.continuity_errors), (200, 0));
        assert!(totals.packets > 1000, "{totals:?}");
    }

    #[test]
    fn ffmpeg_over_rtp_has_neither_gaps_nor_continuity_errors() {
        let Some(totals) = totals_of(Packing::Rtp) else {
            return;
        };
        assert_eq!((totals.continuity_errors, totals.rtp_gaps), (0, 0));
    }
}
