//! Removes native multicast from the guest's site and restores it, and measures the cost of each
//! change of the reception mode.

use std::time::Duration;

use anyhow::{Context, Result};

use super::Testbed;
use super::stream::{self, RECEIVER, STREAM_TIME, Stream, StreamConfig};
use crate::probe::clock;
use crate::probe::log::Sent;
use crate::probe::metrics::{self, Arrival, Window};
use crate::probe::picture::Phase;
use crate::probe::report::FlapRow;
use crate::{Site, wait};

/// Longest time for a change of the mode, including the hold time of a native flow.
const CHANGE: Duration = Duration::from_secs(30);

/// Result of the scenario.
#[derive(Clone, Debug)]
pub struct Flap {
    /// One row for each change, in order.
    pub rows: Vec<FlapRow>,
    /// Every packet sent.
    pub sent: Vec<Sent>,
    /// Every arrival at the application, copies included.
    pub arrivals: Vec<Arrival>,
    /// Window from the first change of the network to the end of the last row.
    pub window: Window,
    /// Phase of each change, from the change of the network to the new mode.
    pub phases: Vec<Phase>,
}

/// Boots the guest on the first VM host, starts its receiver, and removes and restores multicast
/// `times` times. Calls `tell` at each step.
///
/// # Errors
///
/// When a step fails, or the mode does not change in time.
pub fn run(
    testbed: &mut Testbed,
    config: &StreamConfig,
    times: u32,
    tell: &mut dyn FnMut(&str),
) -> Result<Flap> {
    tell("boots the guest on vms1");
    testbed.boot()?;
    let stream = Stream::start(testbed.lab(), config)?;
    testbed
        .guest()?
        .start_receiver(RECEIVER, stream::receiver(config))?;
    stream::wait_snooped(testbed, config.flows)?;
    wait_mode(testbed, "native")?;
    tell("the guest receives natively");
    std::thread::sleep(STREAM_TIME);
    let mut windows = Vec::new();
    for _ in 0..times {
        for (site, mode) in [(Site::UnicastOnly, "relay"), (Site::Multicast, "native")] {
            let from_ns = clock::now_ns();
            tell(&format!("makes site 1 {site}"));
            testbed.lab().router().set_site(1, site)?;
            wait_mode(testbed, mode)?;
            let changed_ns = clock::now_ns();
            tell(&format!("the guest's stream comes by {mode}"));
            std::thread::sleep(STREAM_TIME);
            windows.push((mode, from_ns, changed_ns, clock::now_ns()));
        }
    }
    // The last packets need time to arrive and to be reported.
    std::thread::sleep(STREAM_TIME / 2);
    let sent = stream.stop()?;
    let arrivals = testbed.guest()?.arrivals(RECEIVER);
    testbed.guest()?.stop_receiver(RECEIVER)?;

    let rows = windows
        .iter()
        .map(|(mode, from_ns, changed_ns, to_ns)| {
            let window = Window {
                from_ns: *from_ns,
                to_ns: *to_ns,
            };
            let took_ms = changed_ns.saturating_sub(*from_ns) as f64 / 1e6;
            let metrics = metrics::compute(&sent, &arrivals, window);
            FlapRow::new(mode, config.rate_mbps, took_ms, &metrics)
        })
        .collect();
    let phases = windows
        .iter()
        .map(|(mode, from_ns, changed_ns, _)| Phase {
            name: format!("to {mode}"),
            from_ns: *from_ns,
            to_ns: *changed_ns,
        })
        .collect();
    let window = Window {
        from_ns: windows.first().context("Nothing was changed")?.1,
        to_ns: windows.last().context("Nothing was changed")?.3,
    };
    Ok(Flap {
        rows,
        sent,
        arrivals,
        window,
        phases,
    })
}

/// Waits until the agent of the first VM host receives every address of the stream in `mode`.
/// During a change the agent shows another mode.
fn wait_mode(testbed: &mut Testbed, mode: &str) -> Result<()> {
    let vms1 = testbed.lab().vms1().clone();
    let agents = testbed.agents()?;
    wait::until(&format!("the stream to come by {mode}"), CHANGE, || {
        let streams = agents.query(&vms1, "streams").ok()?;
        let rows = streams.as_array()?;
        (!rows.is_empty() && rows.iter().all(|row| row["mode"] == mode)).then_some(())
    })
}
