//! A real guest, moved by real libvirt between two VM hosts in different subnets.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::{self, Mover, Run, RunConfig};
use lab::scenario::stream::{StreamConfig, StreamKind};
use lab::{LabConfig, Site};

const STREAM: StreamConfig = StreamConfig { rate_mbps: 20.0, flows: 1, kind: StreamKind::Probe };

fn moved(name: &str, site: Site, mover: Mover) -> Run {
    let mut config = LabConfig::new(name);
    config.sites = [Site::Multicast, site];
    let agents = (mover != Mover::Virsh).then(AgentOptions::default);
    let mut testbed = Testbed::up(config, 128, agents).unwrap();
    let run = RunConfig { mover, stream: STREAM, site };
    measure::run(&mut testbed, &run, &mut |step| eprintln!("{step}")).unwrap()
}

#[test]
fn plain_libvirt_moves_the_guest_and_loses_stream() {
    let run = moved("movebase", Site::Multicast, Mover::Virsh);
    assert!(run.row.ok, "{:?}", run.row);
    assert!(run.row.vm_pause_ms > 0.0, "{:?}", run.row);
}
