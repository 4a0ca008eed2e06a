//! `roamcast relay` on a real kernel: a client requests a stream over TLS and receives it by
//! unicast with the announced ports. The stream survives `kill -9` of the relay and ends on
//! release.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::maps::{NO_BRIDGE, StreamKey};
use common::relay::{Endpoints, is_neutral};
use common::signal::{AnnouncedFlow, KnownFlow, Reason, RelayRelease};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use roamcast::net::addresses::addresses;
use roamcast::net::static_join::StaticJoins;
use support::capture::{Capture, Mld, Record};
use support::netns::{self, privileged, wait_for};
use support::relay_net::{
    AGENT, Client, DESTINATION_PORT, Net, RELAY, Received, Relay, SOURCE, SOURCE_PORT, Sender,
    request,
};

const TO_INCLUDE: u8 = 3;
const TO_EXCLUDE: u8 = 4;
const ALLOW: u8 = 5;
const BLOCK: u8 = 6;

fn group(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0x4321, number)
}

fn release() -> RelayRelease {
    RelayRelease(Reason::unspecified("no listener left".to_owned()))
}

fn known() -> KnownFlow {
    KnownFlow {
        source: SOURCE.octets().into(),
        source_port: SOURCE_PORT,
        destination_port: DESTINATION_PORT,
    }
}

/// Returns true if the announced ports give the stream's checksum.
fn announced_right(group: Ipv6Addr, flow: &AnnouncedFlow) -> bool {
    let stream = StreamKey {
        multicast_address: group.octets(),
        source: *flow.source,
        source_port: flow.source_port,
        destination_port: flow.destination_port,
        vlan: 0,
        bridge: NO_BRIDGE,
    };
    let endpoints = Endpoints {
        relay_address: RELAY.octets(),
        relay_port: flow.relay_port,
        agent_address: AGENT.octets(),
        agent_port: flow.agent_port,
    };
    is_neutral(&stream, &endpoints)
}

fn any(capture: &mut Capture, address: Ipv6Addr, kinds: &[u8]) -> bool {
    capture.drain().iter().any(|message| match message {
        Mld::Report(records) => of(records, address, kinds),
        Mld::Query(_) => false,
    })
}

fn of(records: &[Record], address: Ipv6Addr, kinds: &[u8]) -> bool {
    records
        .iter()
        .any(|record| record.multicast_address == address && kinds.contains(&record.kind))
}

/// Replacement for systemd with a descriptor store: stores the descriptors of the service, and
/// passes them to the next start.
struct Systemd {
    socket: UnixDatagram,
    path: PathBuf,
    kept: Vec<(RawFd, String)>,
}

impl Systemd {
    fn new(net: &Net) -> Self {
        let path = net.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self {
            socket,
            path,
            kept: Vec::new(),
        }
    }

    /// Receives the service's notifications.
    fn listen(&mut self) {
        let mut text = [0; 1024];
        let mut space = nix::cmsg_space!([RawFd; 4]);
        loop {
            let mut parts = [std::io::IoSliceMut::new(&mut text)];
            let (length, descriptors) = {
                let received = recvmsg::<UnixAddr>(
                    self.socket.as_raw_fd(),
                    &mut parts,
                    Some(&mut space),
                    MsgFlags::empty(),
                );
                let Ok(received) = received else { return };
                let descriptors: Vec<RawFd> = received
                    .cmsgs()
                    .unwrap()
                    .flat_map(|message| match message {
                        ControlMessageOwned::ScmRights(descriptors) => descriptors,
                        _ => Vec::new(),
                    })
                    .collect();
                (received.bytes, descriptors)
            };
            let said = String::from_utf8_lossy(&text[..length]).into_owned();
            let name = said
                .lines()
                .find_map(|line| line.strip_prefix("FDNAME="))
                .unwrap_or_default()
                .to_owned();
            if said.contains("FDSTOREREMOVE=1") {
                self.kept.retain(|(descriptor, kept)| {
                    let keep = *kept != name;
                    if !keep {
                        nix::unistd::close(*descriptor).unwrap();
                    }
                    keep
                });
            } else {
                self.kept
                    .extend(descriptors.into_iter().map(|it| (it, name.clone())));
            }
        }
    }

    /// Returns the command of the service; the shell places the stored descriptors where systemd
    /// would.
    fn command(&self, config: &Path) -> Command {
        let program = lab::binaries::path("roamcast").unwrap();
        let mut script = String::new();
        let mut names = Vec::new();
        for (place, (descriptor, name)) in (3..).zip(&self.kept) {
            script.push_str(&format!("exec {place}<&{descriptor} {descriptor}<&-; "));
            names.push(name.as_str());
        }
        script.push_str(&format!(
            "export LISTEN_PID=$$; exec {} relay --config {}",
            program.display(),
            config.display()
        ));
        let mut command = Command::new("bash");
        command.args(["-c", &script]);
        command.env("NOTIFY_SOCKET", &self.path);
        if !names.is_empty() {
            command.env("LISTEN_FDS", names.len().to_string());
            command.env("LISTEN_FDNAMES", names.join(":"));
        }
        command
    }
}

/// Panics unless the numbers are complete and in order.
fn assert_gapless(numbers: &[u32]) {
    for pair in numbers.windows(2) {
        assert_eq!(pair[1], pair[0] + 1, "after {} datagrams", numbers.len());
    }
}

#[test]
fn stream_outlives_kill_9_and_a_restart_without_a_gap_and_ends_when_released() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    net.relay.run_with_bpffs(|bpffs| {
        std::thread::scope(|scope| {
            let mut capture = Capture::start(&net.source);
            let config = net.configure(bpffs, "");
            let mut relay = Relay::start(&net, &config);
            let client = Client::start(scope, &net, "vms1");
            client.connect();
            let mut asked = request(group(1), &[]);
            asked.flows = vec![known()];
            client.send(1, asked.clone());
            let response = client.response(1);
            capture.report("join", |it| of(it, group(1), &[TO_EXCLUDE]));
            let flow = response
                .flows
                .first()
                .expect("the flow that was named")
                .clone();
            assert!(announced_right(group(1), &flow));

            let received = Received::start(scope, &net, flow.relay_port, flow.agent_port);
            let sender = Sender::start(scope, &net, group(1), SOURCE_PORT);
            received.more(500);
            assert_eq!(received.numbers()[0], 0, "the first packet is relayed");

            relay.kill();
            // More than two seconds of a stream without a relay process.
            received.more(4000);
            assert!(net.is_joined(group(1)));
            assert!(net.is_neighbour_kept());
            drop(relay);
            let relay = Relay::start(&net, &config);
            let status = net.status();
            assert_eq!(status["sessions"][0]["agent"], serde_json::Value::Null);
            assert_eq!(status["memberships"][0]["holder"], "kernel");
            received.more(500);
            client.connect();
            client.send(2, asked);
            let adopted = client.response(2);
            assert_eq!(adopted.flows, response.flows, "the same ports");
            received.more(500);

            let second = Sender::start(scope, &net, group(1), SOURCE_PORT + 1);
            let response = client.response(2);
            assert_eq!(response.flows.len(), 2, "a new port is announced");
            assert!(
                response
                    .flows
                    .iter()
                    .all(|it| announced_right(group(1), it))
            );
            second.stop();

            let sent = sender.stop();
            wait_for("the last datagram", || {
                (received.numbers().last() == Some(&(sent - 1))).then_some(())
            });
            let numbers = received.numbers();
            assert_gapless(&numbers);
            assert_eq!(numbers.len(), sent as usize, "none lost, none doubled");

            let status = net.status();
            let session = &status["sessions"][0];
            assert_eq!(session["agent"], "vms1");
            let shown = session["flows"]
                .as_array()
                .unwrap()
                .iter()
                .find(|it| it["source_port"] == SOURCE_PORT)
                .unwrap();
            assert_eq!(shown["packets"], sent);
            assert_eq!(shown["dropped"], 0);
            assert!(
                !any(&mut capture, group(1), &[TO_INCLUDE, BLOCK]),
                "left in between"
            );
            client.send(2, release());
            capture.report("leave", |it| of(it, group(1), &[TO_INCLUDE]));
            assert!(!net.is_joined(group(1)));
            assert!(!net.is_neighbour_kept());
            assert_eq!(net.status()["sessions"].as_array().unwrap().len(), 0);
            drop((client, received, relay));
        });
    });
}

#[test]
fn join_of_one_source_outlives_kill_9_where_systemd_keeps_its_socket() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let group = Ipv6Addr::new(0xff3e, 0, 0, 0, 0, 0, 0x4321, 1);
    net.relay.run_with_bpffs(|bpffs| {
        std::thread::scope(|scope| {
            let mut capture = Capture::start(&net.source);
            let config = net.configure(bpffs, "");
            let mut systemd = Systemd::new(&net);
            let mut relay = Relay::run(&net, systemd.command(&config));
            let client = Client::start(scope, &net, "vms1");
            client.connect();
            let mut asked = request(group, &[SOURCE]);
            asked.flows = vec![known()];
            client.send(1, asked.clone());
            let response = client.response(1);
            let records = capture.report("join", |it| of(it, group, &[ALLOW, TO_INCLUDE]));
            assert!(!of(&records, group, &[TO_EXCLUDE]));
            assert_eq!(net.status()["memberships"][0]["holder"], "socket");
            let flow = response.flows.first().unwrap().clone();
            let received = Received::start(scope, &net, flow.relay_port, flow.agent_port);
            let sender = Sender::start(scope, &net, group, SOURCE_PORT);
            received.more(500);

            systemd.listen();
            assert_eq!(systemd.kept.len(), 1, "one socket");
            relay.kill();
            drop(relay);
            received.more(500);
            assert!(net.is_joined(group));
            let relay = Relay::run(&net, systemd.command(&config));
            client.connect();
            client.send(2, asked);
            assert_eq!(client.response(2).flows, response.flows);
            received.more(500);
            let sent = sender.stop();
            wait_for("the last datagram", || {
                (received.numbers().last() == Some(&(sent - 1))).then_some(())
            });
            assert_eq!(received.numbers().len(), sent as usize);
            assert!(!any(&mut capture, group, &[BLOCK]), "left in between");

            client.send(2, release());
            // The new relay leaves the first relay's group once no session can need it.
            wait_for("the leave", || {
                systemd.listen();
                (!net.is_joined(group)).then_some(())
            });
            drop((client, received, relay));
        });
    });
}

#[test]
fn what_is_refused_is_said_in_one_sentence_and_joins_nothing() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    net.relay.run_with_bpffs(|bpffs| {
        std::thread::scope(|scope| {
            let config = net.configure(bpffs, "sessions_per_agent = 1");
            let relay = Relay::start(&net, &config);
            let client = Client::start(scope, &net, "vms1");
            client.connect();
            let request_to = |address: &str| {
                let address: Ipv6Addr = address.parse().unwrap();
                let mut request = request(group(1), &[]);
                request.agent_address = address.octets().into();
                request
            };
            // A foreign address, outside all prefixes of the policy.
            client.send(5, request_to("2001:db8:2::9"));
            let reason = client.refusal(5);
            assert!(
                reason.contains("does not let agent vms1 have streams sent to 2001:db8:2::9"),
                "{reason}"
            );
            client.send(1, request_to("2001:db8:77::1"));
            let reason = client.refusal(1);
            assert!(
                reason.starts_with("Relay relay1 cannot reach 2001:db8:77::1: there is no route"),
                "{reason}"
            );
            client.send(2, request_to("2001:db8:2::77"));
            assert_eq!(
                client.refusal(2),
                "Relay relay1 cannot reach 2001:db8:2::77: the next hop does not answer"
            );
            assert!(!net.is_joined(group(1)));
            client.send(3, request(group(2), &[]));
            client.response(3);
            client.send(4, request(group(3), &[]));
            assert_eq!(
                client.refusal(4),
                "Agent vms1 has 1 sessions with relay relay1 already; release one"
            );
            assert!(!net.is_joined(group(3)));
            assert_eq!(net.status()["counters"]["requests_refused"], 4);
            drop((client, relay));
        });
    });
}

#[test]
fn kernel_held_join_is_known_again_and_spares_what_others_have_joined() {
    if !privileged() {
        return;
    }
    let net = Net::new();
    let ifindex = net.relay.ifindex("up0");
    net.relay
        .ip(&format!("addr add {}/128 dev up0 autojoin nodad", group(9)));
    let mut joins = net.relay.run(|| StaticJoins::open(ifindex)).unwrap();
    joins.add(group(1)).unwrap();
    joins.add(group(1)).unwrap();
    assert!(net.is_joined(group(1)));
    // Packets of this host to the address, and forwarded ones, must not end here.
    wait_for("the route to go", || {
        joins.settle().unwrap();
        (!joins.is_unsettled()).then_some(())
    });
    let routes = net
        .relay
        .run(|| netns::command("ip", &["-6", "route", "show", "table", "local"]));
    assert!(!routes.contains(&group(1).to_string()), "{routes}");
    drop(joins);
    let mut joins = net.relay.run(|| StaticJoins::open(ifindex)).unwrap();
    assert_eq!(joins.list().unwrap(), [group(1)]);
    let own = net.relay.run(|| addresses("up0")).unwrap();
    assert!(!own.global.unwrap().0.is_multicast());
    assert!(joins.remove(group(1)).unwrap());
    assert!(!joins.remove(group(1)).unwrap());
    assert!(!net.is_joined(group(1)));
    assert!(net.is_joined(group(9)));
}
