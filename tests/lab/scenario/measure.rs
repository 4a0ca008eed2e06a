//! One whole run: boot, stream, migration to the second VM host, results.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

pub use super::mover::Mover;

use super::mover::Journey;
use super::party::counted;
use super::stream::{self, Placed, STREAM_TIME, Stream};
use super::tally::{self, Tally};
use super::{Testbed, site_name};
use crate::guest::control::Control;
use crate::probe::clock;
use crate::probe::log::Sent;
use crate::probe::metrics::{Arrival, Window};
use crate::probe::picture::Phase;
use crate::probe::places;
use crate::probe::report::RunRow;
use crate::{Site, wait};

/// Time of the measurement after the guest resumes at the destination.
const AFTER: Duration = Duration::from_secs(3);
/// Time for the last packets of the window to arrive and be reported.
const DRAIN: Duration = Duration::from_millis(500);
/// Parameters of [`run`].
#[derive(Clone, Debug)]
pub struct RunConfig {
    /// Who requests the migration.
    pub mover: Mover,
    /// The stream, and the interface of the guest's join.
    pub stream: Placed,
    /// Network of the destination, for the row of the report.
    pub site: Site,
}

/// Result of [`run`], also of a run whose migration failed.
#[derive(Clone, Debug)]
pub struct Run {
    /// Row of the report; not `ok` if the migration failed.
    pub row: RunRow,
    /// Every packet sent.
    pub sent: Vec<Sent>,
    /// Every arrival at the application, copies included.
    pub arrivals: Vec<Arrival>,
    /// Window of the measurement.
    pub window: Window,
    /// Phases of the migration, in order.
    pub phases: Vec<Phase>,
}

/// Boots the guest, starts its receiver, migrates the guest to the second VM host and measures.
/// Calls `tell` at each step.
///
/// # Errors
///
/// When a step other than the migration fails; a failed migration gives a row that is not `ok`.
pub fn run(testbed: &mut Testbed, config: &RunConfig, tell: &mut dyn FnMut(&str)) -> Result<Run> {
    tell("boots the guest on vms1");
    testbed.boot()?;
    let guest = testbed.guest()?.clone();
    let placed = config.stream;
    let sessions = testbed.converse()?;
    if sessions.is_some() {
        tell("sessions run between peer1 and the guest, by their permanent addresses");
    }
    let stream = Stream::start(testbed.lab(), placed)?;
    tell(&format!(
        "sends {} packets/s to {}",
        placed.config.packets_per_second().round(),
        placed.multicast_address()
    ));
    guest.watch_stalls()?;
    guest.start_receiver(placed.receiver_number(), placed.receiver())?;
    wait::until("the guest to receive", Duration::from_secs(20), || {
        let tally = Tally::take(placed, Vec::new(), &guest);
        tally.has_arrived().then_some(())
    })?;
    if config.mover != Mover::Virsh {
        stream::wait_snooped(testbed, placed.config.flows)?;
    }
    tell(RECEIVES);
    pass([&guest], STREAM_TIME)?;

    let counted_before = counted(testbed, &guest)?;
    let from_ns = clock::now_ns();
    pass([&guest], STREAM_TIME)?;
    let asked_ns = clock::now_ns();
    let journey = Journey {
        testbed,
        domain: testbed.domain_name(),
        control: &guest,
        from: 0,
        to: 1,
    };
    let moved = journey.go(config.mover, tell);
    if let Err(error) = &moved {
        tell(&format!("the move failed: {error:#}"));
    }
    pass([&guest], AFTER)?;
    let mode = match &moved {
        Ok(_) if config.mover != Mover::Virsh => Some(mode(testbed, 1, &placed.addresses())?),
        _ => None,
    };
    let to_ns = clock::now_ns();
    pass([&guest], DRAIN)?;
    let records = journey.records()?;
    let counted = counted(testbed, &guest)?.since(&counted_before);
    let sent = stream.stop()?;
    let tally = Tally::take(placed, sent, &guest);
    guest.stop_receiver(placed.receiver_number())?;

    let window = Window { from_ns, to_ns };
    let arrived = moved.is_ok() && super::ensure_runs_only_on(testbed, "vms2").is_ok();
    let times = moved.unwrap_or_default();
    let row = RunRow {
        site: site_name(config.site).to_owned(),
        baseline: config.mover == Mover::Virsh,
        memory_mib: testbed.domain().memory_mib,
        mode,
        flows: arrived && flows_at_end(&tally, window),
        is_promised: testbed.promises(config.mover, 1, &[placed]),
        ..times.row()
    };
    let row = tally::with_stalls(row, &guest, window);
    let row = match &sessions {
        Some(sessions) => {
            for why in sessions.broken() {
                tell(&format!("a session broke: {why}"));
            }
            sessions.fill(row, window)
        }
        None => row,
    };
    let phases = times.phases(asked_ns, &tally.arrivals);
    let row = tally::fill(row, std::slice::from_ref(&tally), window, &[]);
    Ok(Run {
        row: RunRow {
            lost_at: places::places(row.lost, &counted, journey.to, &records),
            ..row
        }
        .judged(),
        sent: tally.sent,
        arrivals: tally.arrivals,
        window,
        phases,
    })
}

/// Text of the step at which the guest receives its stream and the source's agent knows its
/// addresses.
pub const RECEIVES: &str = "the guest receives";

/// Length of the window's last part, in which the stream must flow, in nanoseconds.
const LATE_NS: u64 = 500_000_000;

/// Returns true if the application received a packet at the destination in the last half second.
/// Totals of MPEG-TS do not name the VM host, so for them a datagram at either VM host counts.
fn flows_at_end(tally: &Tally, window: Window) -> bool {
    let late = Window {
        from_ns: window.to_ns.saturating_sub(LATE_NS),
        to_ns: window.to_ns,
    };
    let mut arrivals = tally.arrivals.iter().rev();
    arrivals
        .by_ref()
        .take_while(|arrival| arrival.host_ns >= late.from_ns)
        // Host 1 is the second VM host.
        .any(|arrival| arrival.host == 1)
        || tally.counted(late) > 0
}

/// Lets the streams run for `time`. Fails if a guest has sent no frame for 30 s, or none at all.
pub(super) fn pass<'a>(
    guests: impl IntoIterator<Item = &'a Control>,
    time: Duration,
) -> Result<()> {
    std::thread::sleep(time);
    for guest in guests {
        let silence = guest.silence().unwrap_or(Duration::MAX);
        ensure!(
            silence < Duration::from_secs(30),
            "A guest has said nothing for {silence:?}"
        );
    }
    Ok(())
}

/// Longest wait until the destination receives every address natively or from a relay.
const SETTLED: Duration = Duration::from_secs(5);

/// Returns how the VM host `host` receives the guest's addresses: `native`, `relay`, or both
/// separated by a comma. While the agent has not decided, the text holds another word of the
/// agent's table. The text is empty if the agent's table has none of the addresses.
pub(super) fn mode(testbed: &Testbed, host: usize, addresses: &[Ipv6Addr]) -> Result<String> {
    let read = || modes(testbed, host, addresses);
    let is_settled = |modes: &BTreeSet<String>| {
        let mut modes = modes.iter();
        modes.all(|mode| matches!(mode.as_str(), "native" | "relay"))
    };
    let settled = wait::until("the way of the addresses", SETTLED, || {
        read().ok().filter(is_settled)
    });
    let modes = settled.or_else(|_| read())?;
    Ok(modes.into_iter().collect::<Vec<_>>().join(","))
}

fn modes(testbed: &Testbed, host: usize, addresses: &[Ipv6Addr]) -> Result<BTreeSet<String>> {
    let vms = &testbed.lab().vms()[host];
    let streams = testbed.running_agents()?.query(vms, "streams")?;
    let rows = streams.as_array().context("No table of streams")?;
    let is_meant = |row: &&serde_json::Value| {
        let address = row["multicast_address"].as_str();
        address
            .and_then(|address| address.parse().ok())
            .is_some_and(|address| addresses.contains(&address))
    };
    let rows = rows.iter().filter(is_meant);
    let modes = rows.filter_map(|row| row["mode"].as_str().map(str::to_owned));
    Ok(modes.collect())
}
