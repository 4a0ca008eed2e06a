//! Migrations that somebody else starts in libvirt: libvirt's hook reports them, and never delays
//! libvirt for long.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::scenario::agents::AgentOptions;
use lab::scenario::measure::Mover;
use lab::scenario::shuttle::Shuttle;
use lab::scenario::stream::{StreamConfig, StreamKind};
use lab::scenario::{Testbed, ensure_runs_only_on, virsh};
use lab::{LabConfig, binaries, requirements, wait};

/// Stream of the paper.
const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 20.0,
    flows: 1,
    kind: StreamKind::Probe,
};
const NAMES: [&str; 2] = ["vms1", "vms2"];
/// Timeout for an agent to write its name into a domain that it has just seen.
const NAMED: Duration = Duration::from_secs(20);
/// Timeout of a migration whose hook reaches nobody.
const UNAIDED: Duration = Duration::from_secs(60);

#[test]
fn virsh_migrate_loses_doubles_and_reorders_nothing_and_works_without_agents() {
    if !requirements::met() {
        return;
    }
    let lab = LabConfig::new("hook");
    let mut testbed = Testbed::up(lab, 128, Some(AgentOptions::DEFAULT)).unwrap();
    let lab = lab::Lab::attach(&testbed.lab().config().name).unwrap();
    testbed.agents().unwrap().install_hooks(&lab).unwrap();
    let mut shuttle = Shuttle::begin(&mut testbed, STREAM).unwrap();
    let mut records = Vec::new();
    for (to, mover) in [
        (1, Mover::Virsh),
        (0, Mover::VirshDirect),
        // The hook of a migration that Roamcast started finds the domain prepared.
        (1, Mover::Operator),
        (0, Mover::Virsh),
        (1, Mover::VirshDirect),
        (0, Mover::VirshDirect),
    ] {
        wait_named(shuttle.testbed(), 1 - to);
        shuttle.go(mover).unwrap();
        records.push([0, 1].map(|host| shuttle.testbed().last_record(host).unwrap()));
    }
    let moves = shuttle.finish().unwrap();
    for (number, (row, records)) in moves.rows.iter().zip(&records).enumerate() {
        eprintln!("{row:?}");
        let told = format!("move {}: {row:?}\n{records:#?}", number + 1);
        assert_eq!(
            (row.lost, row.duplicated, row.reordered),
            (0, 0, 0),
            "{told}"
        );
        let to = 1 - number % 2;
        for (host, record) in records.iter().enumerate() {
            let direction = ["outgoing", "incoming"][usize::from(host == to)];
            assert_eq!(record["direction"], direction, "{told}");
            assert_eq!(record["peer"], NAMES[1 - host], "{told}");
            assert_eq!(record["outcome"]["state"], "completed", "{told}");
        }
        let [flow] = records[to]["handover"].as_array().unwrap().as_slice() else {
            panic!("not one flow: {told}");
        };
        assert_eq!(flow["placed"], "exact", "{told}");
    }
    cancelled_move_is_undone(&mut testbed);
    works_without_agents(&mut testbed);
}

/// Waits until the agent of a VM host has written its name into the guest's domain.
fn wait_named(testbed: &mut Testbed, host: usize) {
    let (vms, name) = (&testbed.lab().vms()[host], testbed.domain_name());
    let what = format!("{} to leave its name with {name}", NAMES[host]);
    wait::until(&what, NAMED, || {
        let metadata = virsh(vms, &["metadata", name, "urn:roamcast:agent:1"]).ok()?;
        metadata.contains(NAMES[host]).then_some(())
    })
    .unwrap();
}

/// Cancels a followed migration at its source.
fn cancelled_move_is_undone(testbed: &mut Testbed) {
    wait_named(testbed, 0);
    let [from, to] = testbed.lab().vms().clone();
    let name = testbed.domain_name().to_owned();
    let memory = format!("tcp://[{}]", to.address());
    let (uri, slow) = (to.uri(), "2");
    let mut migrate = from.virsh();
    migrate.args(["migrate", "--live", "--p2p", "--bandwidth", slow, &name]);
    let mut migrate = migrate.args([&uri, &memory]).spawn().unwrap();
    let copied = |testbed: &mut Testbed| {
        let record = testbed.last_record(0).unwrap();
        record["outcome"]["state"] == "running" && record["processed_bytes"].as_u64() > Some(0)
    };
    wait::until("the source to follow the copy", NAMED, || {
        copied(testbed).then_some(())
    })
    .unwrap();
    virsh(&from, &["domjobabort", &name]).unwrap();
    assert!(!migrate.wait().unwrap().success());
    for host in 0..2 {
        wait::until("both agents to record the failure", NAMED, || {
            let record = testbed.last_record(host).ok()?;
            (record["outcome"]["state"] == "failed").then(|| eprintln!("{}", record["outcome"]))
        })
        .unwrap();
    }
    ensure_runs_only_on(testbed, NAMES[0]).unwrap();
}

fn works_without_agents(testbed: &mut Testbed) {
    wait_named(testbed, 0);
    for index in 0..2 {
        testbed.agents().unwrap().kill(index);
    }
    let hosts = testbed.lab().vms().clone();
    for (from, to) in [(0, 1), (1, 0)] {
        let started = Instant::now();
        let memory = format!("tcp://[{}]", hosts[to].address());
        let arguments = [
            "migrate",
            "--live",
            "--persistent",
            "--undefinesource",
            testbed.domain_name(),
            &hosts[to].uri(),
            &memory,
        ];
        virsh(&hosts[from], &arguments).unwrap();
        eprintln!("without agents: {:?}", started.elapsed());
        assert!(started.elapsed() < UNAIDED);
        ensure_runs_only_on(testbed, NAMES[to]).unwrap();
    }
}

/// Input of libvirt's hook for a domain that arrives from `vms1`.
const XML: &str = "<domain><name>tv</name><uuid>07070707-0707-0707-0707-070707070707</uuid>
    <metadata><r:agent xmlns:r='urn:roamcast:agent:1' name='vms1'/></metadata></domain>";
/// Limits of the hook's run time: documented, and with a margin for a busy machine.
const BOUND: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(15)];

/// Runs the hook as libvirt does. Returns its standard error and its run time.
fn hook(socket: &Path, arguments: &[&str], input: impl Into<Stdio>) -> (String, Duration) {
    let started = Instant::now();
    let mut command = Command::new(binaries::path("roamcast").unwrap());
    command.args(["hook", "run", "--socket"]).arg(socket);
    command.arg("--").args(arguments).stdin(input);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.lines().count() <= 1, "{told}");
    (told, started.elapsed())
}

#[test]
fn hook_never_fails_and_prints_nothing_whatever_it_finds() {
    const BEGIN: [&str; 4] = ["tv", "migrate", "begin", "-"];
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        File::open(path).unwrap()
    };
    // The hook does not read this input to its end, or at all.
    let (told, _) = hook(&socket, &["tv", "start", "begin", "-"], Stdio::piped());
    assert_eq!(told, "");
    let (told, _) = hook(&socket, &[], File::open("/dev/zero").unwrap());
    assert_eq!(told, "");
    let (told, _) = hook(&socket, &BEGIN, File::open("/dev/zero").unwrap());
    assert!(told.contains("more than 4194304 bytes"), "{told}");

    for (bytes, sentence) in [
        (&b""[..], "cannot be parsed"),
        (b"\xff\xfe<domain/>", "could not be read"),
        (b"<domain/>", "no usable element `name`"),
        (XML.as_bytes(), "No agent listens"),
    ] {
        let (told, took) = hook(&socket, &BEGIN, file("xml", bytes));
        assert!(told.contains(sentence), "{told}");
        assert!(took < BOUND[1]);
    }

    // An agent that accepts the request and never answers.
    let silent = UnixListener::bind(&socket).unwrap();
    let agent = std::thread::spawn(move || {
        let (mut stream, _) = silent.accept().unwrap();
        let mut asked = String::new();
        stream.read_to_string(&mut asked).unwrap();
        asked
    });
    let (told, took) = hook(&socket, &BEGIN, file("xml", XML.as_bytes()));
    assert!(told.contains("did not answer within 5 s"), "{told}");
    assert!((BOUND[0]..BOUND[1]).contains(&took), "{took:?}");
    let asked = agent.join().unwrap();
    assert!(asked.contains("\"request\":\"prepare\""), "{asked}");
}
