//! Cases of `bench handover`: the guests, their streams and the migration command.

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::probe::report::RunRow;
use crate::scenario::measure::Mover;
use crate::scenario::stream::{Service, StreamConfig, StreamKind, Streams};
use crate::{LabConfig, Site};

/// The paper's rate, Mbit/s of UDP payload.
pub const RATE_MBPS: f64 = 20.0;

/// A case; the doc lines are the help texts of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Case {
    /// 20 Mbit/s, native at both ends
    Native,
    /// 20 Mbit/s, native at one end and from a relay at the other
    Relay,
    /// 100 Mbit/s
    Dense,
    /// 2, 20 and 50 Mbit/s to one guest, the last source-specific
    Streams,
    /// Two guests that change places
    Crossing,
    /// 20 Mbit/s of packets that are all identical
    Identical,
    /// Migrations by `virsh migrate`, prepared by libvirt's hook
    Virsh,
    /// Migrations by `migkick go` of a guest with a permanent address, whose sessions must go on
    Unicast,
    /// Like native, each migration judged before the next, until one is not exact; only on request
    Soak,
}

impl Case {
    /// All cases that end by themselves, in the order of execution.
    pub const ALL: [Self; 8] = [
        Self::Native,
        Self::Relay,
        Self::Dense,
        Self::Streams,
        Self::Crossing,
        Self::Identical,
        Self::Virsh,
        Self::Unicast,
    ];

    /// Returns the name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Relay => "relay",
            Self::Dense => "dense",
            Self::Streams => "streams",
            Self::Crossing => "crossing",
            Self::Identical => "identical",
            Self::Virsh => "virsh",
            Self::Unicast => "unicast",
            Self::Soak => "soak",
        }
    }

    /// Returns the number of migrations that the case needs as evidence.
    #[must_use]
    pub fn moves(self) -> u32 {
        match self {
            Self::Soak => 500,
            Self::Native | Self::Relay => 20,
            Self::Dense | Self::Unicast => 10,
            Self::Streams | Self::Crossing | Self::Identical | Self::Virsh => 5,
        }
    }

    pub(super) fn lab(self) -> LabConfig {
        let mut config = LabConfig::new("benchhand");
        if self == Self::Relay {
            config.sites = [Site::Multicast, Site::UnicastOnly];
            config.relays = 1;
        }
        config.mobility = self == Self::Unicast;
        config
    }

    pub(super) fn mover(self) -> Mover {
        match self {
            Self::Virsh => Mover::Virsh,
            Self::Unicast => Mover::Migkick,
            _ => Mover::Operator,
        }
    }

    /// Returns the streams; `rate_mbps` is the rate of the stream if the case does not set its own.
    pub(super) fn streams(self, rate_mbps: f64) -> Result<Streams> {
        let probe = StreamConfig::probe;
        Ok(match self {
            Self::Native
            | Self::Relay
            | Self::Virsh
            | Self::Crossing
            | Self::Unicast
            | Self::Soak => probe(rate_mbps).into(),
            Self::Dense => probe(100.0).into(),
            Self::Identical => identical(rate_mbps).into(),
            Self::Streams => Streams::placed(
                0,
                &[
                    (probe(2.0), Service::AnySource),
                    (probe(20.0), Service::AnySource),
                    (probe(50.0), Service::SourceSpecific),
                ],
            )?,
        })
    }

    /// Returns true if a migration was exact: no packet was lost, doubled or reordered, and all
    /// sessions went on. Two cases differ. Of identical packets, at most 5 ms of the stream may be
    /// doubled. The case `Unicast` also requires that the sessions were measured.
    #[must_use]
    pub fn is_exact(self, row: &RunRow) -> bool {
        let may_be_doubled = match row.surplus {
            Some(_) => (identical(row.rate_mbps).packets_per_second() * 0.005) as u64,
            None => 0,
        };
        let exact = row.lost == 0 && row.reordered == 0 && row.duplicated <= may_be_doubled;
        let measured = self != Self::Unicast || row.session_gap_ms().is_some();
        row.ok && exact && measured && row.keeps_sessions()
    }
}

/// Returns the configuration of a stream of identical packets.
const fn identical(rate_mbps: f64) -> StreamConfig {
    StreamConfig {
        kind: StreamKind::Identical,
        ..StreamConfig::probe(rate_mbps)
    }
}
