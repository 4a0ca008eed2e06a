//! Guests in a network without multicast: a relay sends them the stream, whichever process dies.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::time::Duration;

use lab::guest::control::Control;
use lab::guest::wire::{Content, Filter, Join, ReceiverConfig};
use lab::probe::clock;
use lab::probe::log::Sent;
use lab::probe::metrics::{self, Metrics, Window};
use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::{self, Mover, RunConfig};
use lab::scenario::stream::{self, RECEIVER, Stream, StreamConfig};
use lab::scenario::{STREAM_ADDRESS, STREAM_PORT, Testbed, flap};
use lab::topology::{RELAY_SITE, SENDER_ADDRESS};
use lab::{LabConfig, Site, machine, requirements, wait};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(30);

/// Lease of the relay: long enough to restart a process within a third, short enough to wait for. A
/// relay needs 8 s to load its programs in a host machine.
fn lease() -> Duration {
    Duration::from_secs(if machine::inside() { 36 } else { 9 })
}

/// Time for which a process stays dead. In a host machine, the next process needs a good part of
/// the lease until it runs and is found.
fn dead(time: Duration) -> Duration {
    if machine::inside() { lease() / 4 } else { time }
}

fn options() -> AgentOptions {
    AgentOptions {
        relay_lease_s: Some(lease().as_secs()),
        ..AgentOptions::DEFAULT
    }
}

/// Stream of the paper; in a host machine, the share that a guest there can receive.
fn stream_config() -> StreamConfig {
    StreamConfig::probe(if machine::inside() { 2.0 } else { 20.0 })
}

fn testbed(name: &str, sites: [Site; 2], relays: usize, options: AgentOptions) -> Testbed {
    let mut config = LabConfig::new(name);
    config.sites = sites;
    config.relays = relays;
    Testbed::up(config, 128, Some(options)).unwrap()
}

/// Starts a guest on the first VM host, whose site carries no multicast; the guest receives through
/// a relay.
fn relayed(name: &str, relays: usize, options: AgentOptions) -> (Testbed, Stream) {
    let sites = [Site::UnicastOnly, Site::Multicast];
    let mut testbed = testbed(name, sites, relays, options);
    testbed.boot().unwrap();
    let stream = Stream::start(testbed.lab(), &stream_config()).unwrap();
    let guest = testbed.guest().unwrap().clone();
    guest
        .start_receiver(RECEIVER, stream::receiver(&stream_config()))
        .unwrap();
    guest.wait_arrivals(RECEIVER, 100, DEADLINE).unwrap();
    wait_mode(&mut testbed, "relay");
    (testbed, stream)
}

fn streams(testbed: &mut Testbed) -> Vec<Value> {
    let vms1 = testbed.lab().vms1().clone();
    let streams = testbed.agents().unwrap().query(&vms1, "streams");
    streams
        .ok()
        .and_then(|streams| streams.as_array().cloned())
        .unwrap_or_default()
}

fn wait_mode(testbed: &mut Testbed, mode: &str) {
    wait::until(&format!("mode {mode}"), DEADLINE, || {
        let rows = streams(testbed);
        (!rows.is_empty() && rows.iter().all(|row| row["mode"] == mode)).then_some(())
    })
    .unwrap();
}

/// Waits until the guest has received this many more packets.
fn wait_more(guest: &Control, packets: usize) {
    let before = guest.arrivals(RECEIVER).len();
    guest
        .wait_arrivals(RECEIVER, before + packets, DEADLINE)
        .unwrap();
}

fn between(sent: &[Sent], guest: &Control, from_ns: u64, to_ns: u64) -> Metrics {
    let window = Window { from_ns, to_ns };
    metrics::compute(sent, &guest.arrivals(RECEIVER), window)
}

/// Returns the number of packets in this time.
fn packets(time: Duration) -> usize {
    (stream_config().packets_per_second() * time.as_secs_f64()) as usize
}

#[test]
fn guest_that_moves_to_a_site_without_multicast_gets_its_stream_from_a_relay() {
    if !requirements::met() {
        return;
    }
    let sites = [Site::Multicast, Site::UnicastOnly];
    let mut testbed = testbed("rmove", sites, 1, options());
    let config = RunConfig {
        mover: Mover::Migkick,
        stream: (&stream_config()).into(),
        site: Site::UnicastOnly,
    };
    let run = measure::run(&mut testbed, &config, &mut |step| eprintln!("{step}")).unwrap();
    eprintln!("{:?}", run.row);
    let flows_once = run.row.flows && run.row.duplicated == 0;
    assert!(flows_once, "{:?}", run.row);
    assert_eq!(run.row.mode.as_deref(), Some("relay"));
}

#[test]
fn native_reception_goes_and_comes_back_without_a_duplicate() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("rflap", [Site::Multicast; 2], 1, options());
    let flap = flap::run(&mut testbed, &stream_config(), 1, &mut |step| {
        eprintln!("{step}");
    })
    .unwrap();
    for row in &flap.rows {
        assert!(row.ok(), "{row:?}");
    }
}

#[test]
fn guests_of_one_host_share_a_session_and_a_source_list_is_honoured() {
    if !requirements::met() {
        return;
    }
    let (mut testbed, stream) = relayed("rshare", 1, options());
    for number in 2..=3 {
        let filter = if number == 2 {
            Filter::Include(vec![SENDER_ADDRESS])
        } else {
            Filter::Any
        };
        let guest = testbed.boot_further(number).unwrap();
        let receiver = ReceiverConfig {
            interface: "eth0".to_owned(),
            port: STREAM_PORT,
            joins: vec![Join {
                multicast_address: STREAM_ADDRESS,
                count: 1,
                filter,
            }],
            content: Content::Stamped,
        };
        guest.start_receiver(RECEIVER, receiver).unwrap();
        guest.wait_arrivals(RECEIVER, 1000, DEADLINE).unwrap();
    }
    let guest = testbed.guest().unwrap().clone();
    wait_more(&guest, 100);
    let status = testbed.relays().unwrap().status(0).unwrap();
    let sessions = status["sessions"].as_array().unwrap();
    assert_eq!(sessions.len(), 1, "{status}");
    assert_eq!(
        sessions[0]["flows"].as_array().unwrap().len(),
        1,
        "{status}"
    );
    stream.stop().unwrap();
}

#[test]
fn killed_relay_and_killed_agent_lose_no_packet_and_are_adopted() {
    if !requirements::met() {
        return;
    }
    let (mut testbed, stream) = relayed("rkill", 1, options());
    let guest = testbed.guest().unwrap().clone();
    let from_ns = clock::now_ns();
    let mut steps = Vec::new();
    let mut step = |what: &str| steps.push((clock::now_ns(), what.to_owned()));
    step("relay killed");
    testbed.relays().unwrap().kill(0);
    wait_more(&guest, packets(dead(lease())));
    step("relay restarted");
    testbed.relays().unwrap().restart(0).unwrap();
    // Longer than the dead relay's lease, so the new relay has renewed it.
    wait_more(&guest, packets(lease() * 3 / 2));
    step("agent killed");
    testbed.agents().unwrap().kill(0);
    wait_more(&guest, packets(dead(lease() / 2)));
    step("agent restarted");
    testbed.restart_agent(0).unwrap();
    wait_mode(&mut testbed, "relay");
    wait_more(&guest, packets(lease() * 3 / 2));
    let to_ns = clock::now_ns();
    wait_more(&guest, packets(Duration::from_secs(1)));
    let sent = stream.stop().unwrap();
    let metrics = between(&sent, &guest, from_ns, to_ns);
    assert_eq!(
        (metrics.lost, metrics.duplicated, metrics.reordered),
        (0, 0, 0),
        "{metrics:?} {steps:?}",
    );
}

#[test]
fn another_relay_takes_over_and_all_may_be_gone_for_a_while() {
    if !requirements::met() {
        return;
    }
    let (testbed, stream) = relayed("rover", 2, options());
    let guest = testbed.guest().unwrap().clone();
    let switch = testbed.lab().switch(RELAY_SITE);
    let set_links = |state: &str, relays: &[&str]| {
        for relay in relays {
            let mut ip = switch.command("ip");
            let set = ["link", "set", relay, state];
            switch.output(ip.args(set)).unwrap();
        }
    };
    // One of the two relays sends. Whichever dies, the other one takes over.
    for relay in ["relay1", "relay2"] {
        set_links("down", &[relay]);
        wait_more(&guest, packets(Duration::from_secs(2)));
        set_links("up", &[relay]);
        wait_more(&guest, packets(Duration::from_secs(1)));
    }
    set_links("down", &["relay1", "relay2"]);
    wait::until("silence", DEADLINE, || {
        guest
            .arrivals(RECEIVER)
            .last()
            .is_some_and(|last| clock::now_ns() - last.host_ns > 2_000_000_000)
            .then_some(())
    })
    .unwrap();
    set_links("up", &["relay1", "relay2"]);
    wait_more(&guest, packets(Duration::from_secs(2)));
    stream.stop().unwrap();
}

#[test]
fn migration_control_server_tells_an_agent_of_a_relay() {
    if !requirements::met() {
        return;
    }
    // The second relay node is the server.
    let options = AgentOptions {
        mcs: true,
        ..options()
    };
    let (mut testbed, stream) = relayed("rmcs", 2, options);
    let relays = testbed.relays().unwrap();
    let known = |status: &Value| -> Vec<String> {
        let rows = status["registrations"].as_array().unwrap();
        rows.iter()
            .map(|row| format!("{} {}", row["name"], row["role"]).replace('"', ""))
            .collect()
    };
    let all = ["relay1 relay", "vms1 agent", "vms2 agent"];
    assert_eq!(known(&relays.status(1).unwrap()), all);
    // A dead server forgets everything. Sessions continue without it, and its successor learns the
    // relays again.
    relays.kill(1);
    relays.restart(1).unwrap();
    wait::until("registrations", DEADLINE, || {
        (known(&relays.status(1).ok()?) == all).then_some(())
    })
    .unwrap();
    let guest = testbed.guest().unwrap().clone();
    wait_more(&guest, 100);
    stream.stop().unwrap();
}
