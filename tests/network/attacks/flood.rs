//! Floods of frames and messages of every kind that Roamcast processes: from a VM, from a
//! neighbour, and from a peer with a valid certificate.

use std::io::Write as _;
use std::net::{Ipv6Addr, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::signal::{AgentRequest, MAX_FRAME_BYTES, MigrationAbort, Reason};
use common::testing::frame::{Frame, MAC};
use lab::wait;
use nix::sys::socket::{setsockopt, sockopt};
use nix::unistd::gettid;
use roamcast::control::client::Client;
use roamcast::control::request;
use serde_json::Value;
use support::agent::{Agent, domain, uuid};
use support::bridged::{Bridged, SOURCE};
use support::host::group;
use support::hostile::{EndOf, kinds, mac};
use support::netns::{Namespace, privileged, wait_for};
use support::tap::Guest;

/// Frames of each kind.
const FRAMES: usize = 1_000_000;
/// Time limit per kind, for slow machines.
const LONGEST: Duration = Duration::from_secs(10);
/// Duration of a neighbour's and a peer's attack, unless the environment says otherwise.
const SIEGE: Duration = Duration::from_secs(10);
/// Environment variable with the duration in seconds; the full attack takes 60.
const SIEGE_VARIABLE: &str = "ROAMCAST_SIEGE_S";
/// Limit of the agent's memory growth, KiB.
const GROWTH: u64 = 16 * 1024;
/// Pause between two requests of the operator.
const PAUSE: Duration = Duration::from_millis(5);
/// Attempts per attack.
const ROUNDS: u32 = 3;
/// Limit of a standstill of the agent's loop.
const STALL: Duration = Duration::from_millis(50);
/// Limit of the time that an operator waits for the agent's state.
const ANSWER: Duration = Duration::from_millis(100);
const VICTIM: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
const PORT: u16 = 5004;
/// Interval between two packets of the victim's stream.
const INTERVAL: Duration = Duration::from_millis(1);
/// Socket buffer of the victim, bytes: several seconds of its stream, for a busy machine.
const BUFFER: usize = 16 << 20;
const RULES: &str = "[[policy.arrive]]\nsources = [\"*\"]\ndomains = [\"*\"]\n";

/// Sends up to `most` frames of a kind within `time`. Returns their number.
fn flood(frames: &[Vec<u8>], most: usize, time: Duration, mut send: impl FnMut(&[u8])) -> usize {
    let end = Instant::now() + time;
    let mut sent = 0;
    for frame in frames.iter().cycle().take(most) {
        send(frame);
        sent += 1;
        if sent % 1024 == 0 && Instant::now() >= end {
            break;
        }
    }
    sent
}

/// Returns the listeners of the VM behind a TAP, according to the agent.
fn listeners(agent: &Agent, port: &str) -> Vec<String> {
    let rows = agent.query("listeners").unwrap();
    let rows = rows.as_array().unwrap().iter();
    let of_port = rows.filter(|row| row["port"] == port);
    let mut addresses: Vec<String> = of_port
        .map(|row| row["multicast_address"].as_str().unwrap().to_owned())
        .collect();
    addresses.sort();
    addresses
}

/// Returns the victim's listeners once the agent knows all of them.
fn victims_listeners(agent: &Agent) -> Vec<String> {
    wait_for("the victim's listeners", || {
        Some(listeners(agent, "vnet1")).filter(|it| it.len() >= 20)
    })
}

/// A VM that listens to several addresses and receives a stream.
struct Victim {
    guest: Guest,
    socket: UdpSocket,
}

impl Victim {
    /// Starts beside an agent. The agent learns the listeners once it watches the port.
    fn start(host: &Namespace, agent: &Agent) -> Self {
        let guest = Guest::start(host, "br0", "vnet1", 0);
        wait_for("the victim's port", || {
            let status = agent.query("status").unwrap();
            let mut ports = status["ports"].as_array().unwrap().iter();
            let is_watched = |it: &Value| {
                let hooks = it["hooks"].as_array().unwrap();
                it["name"] == "vnet1" && hooks.iter().any(|hook| hook["program"] == "snoop")
            };
            ports.any(is_watched).then_some(())
        });
        let inner = guest.namespace.ifindex("eth0");
        let socket = guest.namespace.run(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT)).unwrap();
            for number in 1..=20 {
                socket.join_multicast_v6(&group(number), inner).unwrap();
            }
            socket
        });
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).unwrap();
        let patience = Duration::from_millis(200);
        socket.set_read_timeout(Some(patience)).unwrap();
        Self { guest, socket }
    }

    /// Receives until the sender has finished. Returns the numbers of the packets.
    fn receive(&self, is_over: &AtomicBool) -> Vec<u32> {
        let mut numbers = Vec::new();
        let mut packet = [0; 16];
        loop {
            match self.socket.recv(&mut packet) {
                Ok(4) => numbers.push(u32::from_be_bytes([
                    packet[0], packet[1], packet[2], packet[3],
                ])),
                Ok(_) => {}
                Err(_) if is_over.load(Ordering::Relaxed) => return numbers,
                Err(_) => {}
            }
        }
    }
}

#[test]
fn a_million_frames_of_each_kind_from_a_vm_change_nothing_for_another() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    let host = &setup.host;
    host.run_with_bpffs(|bpffs| {
        let domains = [
            domain("attacker", 1, "vnet0", MAC),
            domain("victim", 2, "vnet1", VICTIM),
        ];
        let agent = Agent::start(bpffs, &domains, RULES);
        let victim = Victim::start(host, &agent);
        let known = victims_listeners(&agent);
        let memory = agent.peak_memory();
        let (is_over, has_ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let stream = Frame::udp(SOURCE, &group(1).to_string(), (5000, PORT), &[0; 4])
            .with(|it| it.checksum = true);
        thread::scope(|scope| {
            let (end_of_stream, end) = (EndOf(&is_over), EndOf(&has_ended));
            let received = scope.spawn(|| victim.receive(&has_ended));
            let sender = scope.spawn(|| {
                let mut number = 0_u32;
                while !is_over.load(Ordering::Relaxed) {
                    let payload = number.to_be_bytes();
                    let frame = stream
                        .clone()
                        .with(|it| it.body[8..].copy_from_slice(&payload));
                    setup.sender.send(&frame.bytes());
                    number += 1;
                    thread::sleep(INTERVAL);
                }
                number
            });
            for (kind, frames) in host.run(|| kinds(mac("br0"))) {
                let mut tap = &setup.taps[0];
                let sent = flood(&frames, FRAMES, LONGEST, |frame| {
                    // A frame that the host refuses was not sent.
                    let _ = tap.write(frame);
                });
                println!("{sent} {kind}");
                assert_eq!(listeners(&agent, "vnet1"), known, "after {kind}");
            }
            drop(end_of_stream);
            let sent = sender.join().unwrap();
            // The socket waited once for a packet that did not arrive.
            drop(end);
            let received = received.join().unwrap();
            let first = *received.first().unwrap();
            assert!(first < sent / 2, "the stream began late");
            let expected: Vec<u32> = (first..sent).collect();
            assert!(
                received == expected,
                "{} of {}",
                received.len(),
                expected.len()
            );
        });
        let grown = agent.peak_memory() - memory;
        println!("{grown} KiB");
        assert!(grown < GROWTH, "{grown} KiB");
        assert!(agent.counter("refused_listeners") > 0);
        drop(victim.guest);
    });
}

/// Effect of an attack on an agent.
#[derive(Debug)]
struct Siege {
    /// Growth of the agent's memory, KiB.
    grown: u64,
    /// Longest time that an operator waited for an answer.
    answer: Duration,
    /// Standstills of the loop of 50 ms or more.
    stalls: u64,
    /// Longest standstill since the agent's start.
    longest: Duration,
}

impl Siege {
    /// Attacks an agent for a while, and requests its state all the time.
    fn lay(agent: &Agent, attack: impl FnOnce(&AtomicBool) + Send) -> Self {
        let seconds = std::env::var(SIEGE_VARIABLE).ok();
        let time = seconds.map_or(SIEGE, |it| Duration::from_secs(it.parse().unwrap()));
        put_first(&agent.child.id().to_string(), true);
        let (memory, before) = (agent.peak_memory(), stalls(agent));
        let is_over = AtomicBool::new(false);
        let mut answer = Duration::ZERO;
        thread::scope(|scope| {
            scope.spawn(|| attack(&is_over));
            scope.spawn(|| {
                put_first(&gettid().to_string(), false);
                let _end_of_attack = EndOf(&is_over);
                let end = Instant::now() + time;
                while Instant::now() < end {
                    let asked = Instant::now();
                    let mut client = Client::connect(&agent.path("agent.sock")).unwrap();
                    client.ask(&request::Agent::Status, |_| {}).unwrap();
                    answer = answer.max(asked.elapsed());
                    thread::sleep(PAUSE);
                }
            });
        });
        let after = stalls(agent);
        Self {
            grown: agent.peak_memory() - memory,
            answer,
            stalls: after.0 - before.0,
            longest: after.1,
        }
    }

    fn keeps_nobody_waiting(&self) -> bool {
        let stands_still = self.stalls > 0 && self.longest >= wait::patience(STALL);
        self.answer < wait::patience(ANSWER) && !stands_still
    }
}

/// Asserts that nobody but the attacker notices an attack. Other load on the machine may take a CPU
/// or a kernel lock from the agent once; an effect of the attack recurs in each attempt.
fn withstand(agent: &Agent, mut attack: impl FnMut(&AtomicBool) + Send) {
    for round in 1..=ROUNDS {
        let siege = Siege::lay(agent, &mut attack);
        println!("{siege:?}");
        assert!(siege.grown < GROWTH, "{siege:?}");
        if siege.keeps_nobody_waiting() {
            return;
        }
        assert!(round < ROUNDS, "{siege:?}");
    }
}

/// Gives a task or a whole process priority over all others, so that the test measures its work and
/// not its wait for a CPU.
fn put_first(task: &str, is_process: bool) {
    let mut command = Command::new("chrt");
    command.args(is_process.then_some("--all-tasks"));
    let output = command.args(["--fifo", "--pid", "1", task]).output();
    let output = output.unwrap();
    // Some kernels grant no such priority inside a control group; the test then runs without it.
    if !output.status.success() {
        println!("{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Returns the number of standstills of an agent's loop, and the longest.
fn stalls(agent: &Agent) -> (u64, Duration) {
    let status = agent.status().unwrap();
    let number = |key: &str| status[key].as_u64().unwrap();
    let longest = Duration::from_millis(number("longest_stall_ms"));
    (number("stalls"), longest)
}

#[test]
fn neighbour_that_sends_without_end_costs_little_memory_and_keeps_nobody_waiting() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    let host = &setup.host;
    host.run_with_bpffs(|bpffs| {
        let agent = Agent::start(bpffs, &[domain("victim", 2, "vnet1", VICTIM)], RULES);
        let victim = Victim::start(host, &agent);
        victims_listeners(&agent);
        let mut frames: Vec<_> = host
            .run(|| kinds(mac("br0")))
            .into_iter()
            .flat_map(|(_, it)| it)
            .collect();
        // Unsolicited flows to addresses to which a VM listens.
        frames.extend((1..20_000).map(|port| {
            let group = group(port % 20 + 1).to_string();
            Frame::udp(SOURCE, &group, (port, PORT), b"made up").bytes()
        }));
        withstand(&agent, |is_over| {
            while !is_over.load(Ordering::Relaxed) {
                flood(&frames, frames.len(), SIEGE, |frame| {
                    setup.sender.send(frame);
                });
            }
        });
        drop(victim.guest);
    });
}

#[test]
fn peer_that_speaks_without_end_costs_little_memory_and_keeps_nobody_waiting() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    host.run_with_bpffs(|bpffs| {
        let agent = Agent::start(bpffs, &[domain("victim", 2, "vnet1", VICTIM)], RULES);
        let mut peer = agent.peer("vms2");
        let mut transaction = 0;
        withstand(&agent, |is_over| {
            while !is_over.load(Ordering::Relaxed) {
                for _ in 0..64 {
                    transaction += 2;
                    peer.say(transaction, request(transaction));
                    let reason = "x".repeat(500);
                    peer.say(transaction + 1, MigrationAbort(Reason::unspecified(reason)));
                }
                peer.say_bytes(&vec![0x9f; MAX_FRAME_BYTES]);
                peer.answer(transaction);
            }
        });
    });
}

/// Returns a request for a different domain each time.
fn request(number: u64) -> AgentRequest {
    let mut uuid = uuid(0xee);
    uuid[..8].copy_from_slice(&number.to_be_bytes());
    AgentRequest {
        domain_uuid: uuid.into(),
        domain_name: format!("tv-{number}"),
        macs: vec![],
        listeners: vec![],
        vm_transaction: None,
    }
}
