//! Cases of `bench handover`: the guests, their streams and the migration command.

use anyhow::Result;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::probe::report::RunRow;
use crate::scenario::agents::AgentOptions;
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
    /// Migrations that fail after the VM has stopped; the VM resumes at its source host
    Cancelled,
    /// Like native, each migration judged before the next, until one is not exact; only on request
    Soak,
}

impl Case {
    /// All cases that end by themselves, in the order of execution.
    pub const ALL: [Self; 9] = [
        Self::Native,
        Self::Relay,
        Self::Dense,
        Self::Streams,
        Self::Crossing,
        Self::Identical,
        Self::Virsh,
        Self::Unicast,
        Self::Cancelled,
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
            Self::Cancelled => "cancelled",
            Self::Soak => "soak",
        }
    }

    /// Returns the number of migrations that the case needs as evidence.
    #[must_use]
    pub fn moves(self) -> u32 {
        match self {
            Self::Soak => 500,
            Self::Native | Self::Relay => 20,
            Self::Dense | Self::Unicast | Self::Cancelled => 10,
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

    /// Returns the configuration of the case's agents.
    pub(super) fn agents(self, agents: AgentOptions) -> AgentOptions {
        if self != Self::Cancelled {
            return agents;
        }
        // While the destination's QEMU stands still, the copy is so slow that it would not end.
        AgentOptions {
            downtime_ms: 2000,
            ..agents
        }
    }

    pub(super) fn mover(self) -> Mover {
        match self {
            Self::Virsh => Mover::Virsh,
            Self::Unicast => Mover::Migkick,
            Self::Cancelled => Mover::Cancelled,
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
            | Self::Cancelled
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
    /// sessions went on. Three cases differ. Of identical packets, at most 5 ms of the stream may be
    /// doubled. The case `Unicast` also requires that the sessions were measured. A cancelled migration
    /// may lose as many packets as its record names.
    #[must_use]
    pub fn is_exact(self, row: &RunRow) -> bool {
        let may_be_doubled = match row.surplus {
            Some(_) => (identical(row.rate_mbps).packets_per_second() * 0.005) as u64,
            None => 0,
        };
        let may_be_lost = match self {
            Self::Cancelled => row.thrown_away_at_most.unwrap_or_default(),
            _ => 0,
        };
        let exact =
            row.lost <= may_be_lost && row.reordered == 0 && row.duplicated <= may_be_doubled;
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
