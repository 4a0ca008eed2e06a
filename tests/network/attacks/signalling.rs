//! Somebody else answers in place of a VM's agent: another VM of the host, or a neighbour on the
//! link. Both know all messages of the VM, including the transaction number.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::counter::Counter;
use common::signal::{
    AgentSearchReply, MigrationAbort, MigrationProgress, MigrationResponse, PORT, Phase, Reason,
    VmMessage,
};
use common::testing::frame::{Frame, address};
use lab::binaries;
use roamcast::datapath::Datapath;
use roamcast::net::addresses::addresses;
use roamcast::net::vm_socket::VmSocket;
use serde_json::Value;
use support::host::{LIMITS, config};
use support::netns::{Namespace, privileged};
use support::tap::Guest;
use support::wire::Wire;

/// Copied bytes that the real agent reports; the attackers report another number.
const BY_AGENT: u64 = 4242;
const BY_FORGER: u64 = 666;
const GO: [&str; 4] = ["go", "vms2", "--no-configure", "--json"];

/// The victim and its attackers.
struct Scene {
    host: Namespace,
    victim: Guest,
    attacker: Guest,
    neighbour: Namespace,
}

impl Scene {
    fn new() -> Self {
        let host = Namespace::new("host");
        host.add_bridge("br0");
        let victim = Guest::start(&host, "br0", "vnet0", 0);
        let attacker = Guest::start(&host, "br0", "vnet1", 0);
        let neighbour = Namespace::new("neighbour");
        host.add_peer("br0", "up0", &neighbour, "eth0");
        Self {
            host,
            victim,
            attacker,
            neighbour,
        }
    }

    fn migkick(&self, arguments: &[&str]) -> Output {
        let program = binaries::path("migkick").unwrap();
        let namespace = &self.victim.namespace;
        namespace.run(|| Command::new(program).args(arguments).output().unwrap())
    }

    /// Returns the agent's link-local address, which everybody knows.
    fn agent_address(&self) -> Ipv6Addr {
        let found = self.host.run(|| addresses("br0").unwrap());
        found.link_local.unwrap()
    }
}

/// Attackers' answers, by the number of the VM's message.
#[derive(Default)]
struct Forged(Mutex<BTreeSet<u8>>);

impl Forged {
    fn add(&self, kind: u8) {
        self.0.lock().unwrap().insert(kind);
    }

    fn has(&self, kind: u8) -> bool {
        self.0.lock().unwrap().contains(&kind)
    }
}

fn kind(message: &VmMessage) -> u8 {
    match message {
        VmMessage::AgentSearch(_) => 1,
        VmMessage::MigrationRequest(_) => 3,
        VmMessage::MigrationReady(_) => 9,
        other => panic!("no message of a VM: {other:?}"),
    }
}

fn search_reply(agent: &str) -> VmMessage {
    VmMessage::from(AgentSearchReply {
        agent: agent.to_owned(),
        domain: "viewer".to_owned(),
        destinations: vec!["vms2".to_owned()],
    })
}

fn completed(processed_bytes: u64) -> VmMessage {
    VmMessage::from(MigrationProgress {
        phase: Phase::Completed,
        processed_bytes,
        total_bytes: processed_bytes,
        elapsed_ms: 1,
        vm_pause_ms: Some(1),
        clock_ns: None,
    })
}

/// Returns the answer of a cooperative agent, real or forged, whose migration completes.
fn cooperative(message: &VmMessage, name: &str, bytes: u64) -> VmMessage {
    match message {
        VmMessage::AgentSearch(_) => search_reply(name),
        VmMessage::MigrationRequest(_) => VmMessage::from(MigrationResponse {
            prefix: address("2001:db8:2::").into(),
            prefix_length: 64,
            agent_address: address("2001:db8:2::10").into(),
        }),
        _ => completed(bytes),
    }
}

/// Answers that would end the VM's migration by its agent.
fn hostile(message: &VmMessage) -> Vec<VmMessage> {
    let reason = "forged".to_owned();
    let abort = VmMessage::from(MigrationAbort(Reason::unspecified(reason)));
    match message {
        VmMessage::AgentSearch(_) => vec![search_reply("evil"), abort],
        VmMessage::MigrationRequest(_) => vec![abort],
        _ => vec![completed(BY_FORGER), abort],
    }
}

/// Returns a datagram in a plain frame, and in frames with headers that hide it.
fn frames(from: Ipv6Addr, to_port: u16, payload: &[u8]) -> Vec<Frame> {
    let plain = || {
        Frame::udp(&from.to_string(), "ff02::1", (PORT, to_port), payload)
            .with(|f| (f.checksum, f.hop_limit) = (true, 255))
    };
    let options = || (60, vec![0, 1, 4, 0, 0, 0, 0]);
    let fragment = || (44, vec![0, 0, 0, 0, 0, 0, 7]);
    vec![
        plain(),
        plain().with(|f| f.headers = vec![options()]),
        plain().with(|f| f.headers = vec![fragment()]),
        plain().with(|f| f.options = Some(vec![1, 4, 0, 0, 0, 0])),
    ]
}

/// Returns the port, transaction and message of a frame to an agent.
fn request(frame: &[u8]) -> Option<(u16, u64, VmMessage)> {
    let is_udp = frame.get(12..14)? == [0x86, 0xdd] && frame.get(20)? == &17;
    let [s0, s1, d0, d1] = frame.get(54..58)?.try_into().ok()?;
    if !is_udp || u16::from_be_bytes([d0, d1]) != PORT {
        return None;
    }
    let (transaction, message) = VmMessage::decode(frame.get(62..)?).ok()?;
    Some((u16::from_be_bytes([s0, s1]), transaction, message))
}

/// Answers all messages of the victim, from the attacker's NIC and the neighbour's, until the test
/// is over.
fn forge(
    scene: &Scene,
    forged: &Forged,
    over: &AtomicBool,
    answer: impl Fn(&VmMessage) -> Vec<VmMessage>,
) {
    let from = scene.agent_address();
    let wire = |namespace: &Namespace, make: fn(u32) -> Wire| {
        let ifindex = namespace.ifindex("eth0");
        namespace.run(|| make(ifindex))
    };
    let ear = wire(&scene.victim.namespace, Wire::listening);
    let senders = [&scene.attacker.namespace, &scene.neighbour].map(|it| wire(it, Wire::new));
    while !over.load(Ordering::Relaxed) {
        for (port, transaction, message) in ear.received().iter().filter_map(|it| request(it)) {
            for said in answer(&message) {
                let payload = said.encode(transaction);
                for frame in frames(from, port, &payload) {
                    for sender in &senders {
                        sender.send(&frame.bytes());
                    }
                }
            }
            forged.add(kind(&message));
        }
        thread::yield_now();
    }
}

/// Answers as the agent does, but only after the attackers.
fn serve(forged: &Forged, over: &AtomicBool) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let socket = VmSocket::open("br0").unwrap();
        while !over.load(Ordering::Relaxed) {
            let look = Duration::from_millis(50);
            let Ok(datagram) = tokio::time::timeout(look, socket.recv()).await else {
                continue;
            };
            let datagram = datagram.unwrap();
            let (transaction, message) = VmMessage::decode(&datagram.bytes).unwrap();
            if forged.has(kind(&message)) {
                let answer = cooperative(&message, "vms1", BY_AGENT).encode(transaction);
                socket.send(datagram.from, &answer).await.unwrap();
            }
        }
    });
}

fn report(output: &Output) -> Value {
    let error = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("migkick: {error}"))
}

#[test]
fn nobody_but_the_agent_answers_a_vm() {
    if !privileged() {
        return;
    }
    let scene = Scene::new();
    let (forged, over) = (Forged::default(), AtomicBool::new(false));
    let forger = |message: &VmMessage| vec![cooperative(message, "evil", BY_FORGER)];
    let undefended = thread::scope(|scope| {
        scope.spawn(|| forge(&scene, &forged, &over, forger));
        let output = scene.migkick(&GO);
        over.store(true, Ordering::Relaxed);
        report(&output)
    });
    assert_eq!(undefended["source"], "evil", "no attack: {undefended}");
    assert_eq!(undefended["processed_bytes"], BY_FORGER, "no attack");

    let (forged, over) = (Forged::default(), AtomicBool::new(false));
    let at_attacker = scene.attacker.namespace.ifindex("eth0");
    let ear = scene
        .attacker
        .namespace
        .run(|| Wire::listening(at_attacker));
    let defended = scene.host.run_with_bpffs(|bpffs: &Path| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        let ports = [(&scene.victim, "vnet0"), (&scene.attacker, "vnet1")];
        for (guest, name) in ports {
            datapath.attach_port(guest.ifindex, name, &LIMITS).unwrap();
        }
        let defended = thread::scope(|scope| {
            scope.spawn(|| forge(&scene, &forged, &over, hostile));
            scope.spawn(|| scene.host.run(|| serve(&forged, &over)));
            let output = scene.migkick(&GO);
            over.store(true, Ordering::Relaxed);
            report(&output)
        });
        let [victim, attacker] = ports.map(|(guest, _)| datapath.usage(guest.ifindex).unwrap());
        assert!(attacker.forged_datagrams > 0, "{attacker:?}");
        assert_eq!(victim.forged_datagrams, 0, "{victim:?}");
        assert!(victim.withheld_datagrams > 0, "the neighbour's: {victim:?}");
        assert!(
            attacker.withheld_datagrams > 0,
            "the victim's: {attacker:?}"
        );
        let withheld = datapath.counter(Counter::SignallingWithheld).unwrap();
        let by_port = victim.withheld_datagrams + attacker.withheld_datagrams;
        assert_eq!(withheld, by_port);
        defended
    });
    assert_eq!(defended["source"], "vms1", "{defended}");
    assert_eq!(defended["processed_bytes"], BY_AGENT, "{defended}");
    let overheard: Vec<_> = ear.received().iter().filter_map(|it| request(it)).collect();
    assert_eq!(overheard, [], "another VM hears the transaction");
}

#[test]
fn vm_whose_kernel_would_have_it_ask_from_the_agents_port_asks_from_another() {
    if !privileged() {
        return;
    }
    let scene = Scene::new();
    scene.victim.namespace.run(|| {
        let range = "/proc/sys/net/ipv4/ip_local_port_range";
        std::fs::write(range, "47411 47412").unwrap();
    });
    let (forged, over) = (Forged::default(), AtomicBool::new(false));
    forged.add(1);
    scene.host.run_with_bpffs(|bpffs: &Path| {
        let datapath = Datapath::load(&config(bpffs)).unwrap();
        datapath
            .attach_port(scene.victim.ifindex, "vnet0", &LIMITS)
            .unwrap();
        let reports = thread::scope(|scope| {
            scope.spawn(|| scene.host.run(|| serve(&forged, &over)));
            let outputs = [(); 4].map(|()| scene.migkick(&["search", "--json"]));
            over.store(true, Ordering::Relaxed);
            outputs
        });
        for output in &reports {
            assert_eq!(report(output)["agent"], "vms1");
        }
        assert_eq!(
            datapath
                .usage(scene.victim.ifindex)
                .unwrap()
                .forged_datagrams,
            0
        );
    });
}
