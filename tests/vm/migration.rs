//! libvirt moves a real guest between two VM hosts in different subnets.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use lab::node::Node;
use lab::probe::eavesdropper::Eavesdropper;
use lab::probe::ffmpeg::Packing;
use lab::scenario::agents::{AgentOptions, install_qemu_certificates};
use lab::scenario::measure::{self, Mover, Run, RunConfig};
use lab::scenario::stream::{self, RECEIVER, Stream, StreamConfig, StreamKind};
use lab::scenario::{STREAM_ADDRESS, Testbed, ensure_runs_only_on};
use lab::{LabConfig, Site, machine, requirements, wait};
use serde_json::{Value, json};
use support::hostile;
use support::tap;

/// Stream of the paper.
const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 20.0,
    flows: 1,
    kind: StreamKind::Probe,
};
/// Stream that an emulated host can carry beside its other load.
const LIGHT: StreamConfig = StreamConfig {
    rate_mbps: 2.0,
    flows: 1,
    kind: StreamKind::Probe,
};
/// Stream slow enough for two busy CPUs to encode and translate.
const TELEVISION: StreamConfig = StreamConfig {
    rate_mbps: 4.0,
    flows: 1,
    kind: StreamKind::Ffmpeg(Packing::Rtp),
};
const MOVE: Duration = Duration::from_secs(60);
const LATE: Site = Site::Late(2000);
/// Timeouts longer than the growth of the late tree.
const PATIENT: AgentOptions = AgentOptions {
    tree_budget_ms: Some(5000),
    ..AgentOptions::DEFAULT
};

fn testbed(name: &str, site: Site, agents: Option<AgentOptions>) -> Testbed {
    let mut config = LabConfig::new(name);
    config.sites = [Site::Multicast, site];
    Testbed::up(config, 128, agents).unwrap()
}

fn moved(testbed: &mut Testbed, site: Site, mover: Mover, stream: StreamConfig) -> Run {
    let config = RunConfig {
        mover,
        stream: (&stream).into(),
        site,
    };
    let run = measure::run(testbed, &config, &mut |step| eprintln!("{step}")).unwrap();
    eprintln!("{:?}", run.row);
    run
}

/// Asserts that both agents recorded a completed migration, with the stream native at the
/// destination.
fn assert_recorded(testbed: &mut Testbed) {
    for (host, direction, peer) in [(0, "outgoing", "vms2"), (1, "incoming", "vms1")] {
        let row = testbed.last_record(host).unwrap();
        assert_eq!(row["direction"], direction, "{row}");
        assert_eq!(row["peer"], peer, "{row}");
        assert_eq!(row["domain"], testbed.domain_name(), "{row}");
        assert_eq!(row["outcome"]["state"], "completed", "{row}");
        assert_eq!(row["phase"], "completed", "{row}");
        for time in ["signalling_ms", "total_ms", "vm_pause_ms"] {
            assert!(row[time].is_number(), "{time}: {row}");
        }
        let joined = row["receptions"]
            .as_array()
            .unwrap()
            .iter()
            .find(|reception| reception["multicast_address"] == STREAM_ADDRESS.to_string());
        assert_eq!(joined.unwrap()["mode"], "native", "{row}");
    }
}

#[test]
fn a_move_keeps_the_stream_at_a_multicast_site_and_at_a_late_one() {
    if !requirements::met() {
        return;
    }
    let site = Site::Multicast;
    let mut testbed = testbed("migrate", site, Some(PATIENT));
    for mover in [Mover::Migkick, Mover::Operator] {
        let run = moved(&mut testbed, site, mover, STREAM);
        assert!(run.row.flows, "{mover:?}: {:?}", run.row);
        ensure_runs_only_on(&testbed, "vms2").unwrap();
        assert_recorded(&mut testbed);
    }

    let run = moved(&mut testbed, site, Mover::Migkick, TELEVISION);
    assert!(run.row.flows, "{:?}", run.row);
    let errors = run.row.continuity_errors;
    assert!(errors.is_some(), "continuity is counted: {:?}", run.row);
    assert!(run.row.received > 0, "{:?}", run.row);
    assert_recorded(&mut testbed);

    a_move_to_a_late_site_waits_for_the_tree(&mut testbed);
}

/// Moves the guest to a site whose tree takes two seconds to grow.
fn a_move_to_a_late_site_waits_for_the_tree(testbed: &mut Testbed) {
    let router = testbed.lab().router();
    wait::until("the tree to be pruned", Duration::from_secs(20), || {
        (!router.forwards(STREAM_ADDRESS, 2).ok()?).then_some(())
    })
    .unwrap();
    router.set_site(2, LATE).unwrap();
    let run = moved(testbed, LATE, Mover::Migkick, STREAM);
    assert!(run.row.flows, "{:?}", run.row);
    assert!(run.row.loss_ms <= 400.0, "{:?}", run.row);
    assert!(run.row.signalling_ms >= 2000.0, "{:?}", run.row);
    assert_recorded(testbed);
}

#[test]
fn a_light_stream_goes_on_through_one_move() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("miglight", Site::Multicast, Some(PATIENT));
    let run = moved(&mut testbed, Site::Multicast, Mover::Migkick, LIGHT);
    assert!(run.row.flows, "{:?}", run.row);
    ensure_runs_only_on(&testbed, "vms2").unwrap();
    assert_recorded(&mut testbed);
    if machine::inside() {
        // This migration shows that KVM and vhost-net change nothing. The kernel keeps the first 15
        // bytes of a program's name.
        for device in ["/dev/kvm", "/dev/vhost-net"] {
            assert!(has_open("qemu-system-x86", device), "QEMU without {device}");
        }
    }
}

/// Hostile frames per burst of a VM, and the pause after each burst, so that others still get a
/// CPU.
const AT_ONCE: usize = 20;
const REST: Duration = Duration::from_millis(10);

/// Sends hostile frames of each kind in turn as a VM on a host, from `has_begun` until `is_over`.
/// Returns their number.
fn flood(host: &Node, has_begun: &AtomicBool, is_over: &AtomicBool) -> usize {
    while !has_begun.load(Ordering::Relaxed) {
        if is_over.load(Ordering::Relaxed) {
            return 0;
        }
        thread::sleep(REST);
    }
    let (mut tap, kinds) = host
        .within(|| (tap::open("attacker"), hostile::kinds(hostile::mac("br0"))))
        .unwrap();
    lab::netns::ip(host.namespace(), "link set attacker master br0 up").unwrap();
    let longest = kinds.iter().map(|(_, frames)| frames.len()).max();
    let in_turn = (0..longest.unwrap()).cycle().flat_map(|number| {
        let frames = kinds.iter();
        frames.map(move |(_, frames)| &frames[number % frames.len()])
    });
    let mut sent = 0;
    for frame in in_turn {
        // A frame that the host refuses was not sent.
        let _ = tap.write(frame);
        sent += 1;
        if sent % AT_ONCE == 0 {
            if is_over.load(Ordering::Relaxed) {
                return sent;
            }
            thread::sleep(REST);
        }
    }
    sent
}

#[test]
fn a_move_beside_vms_that_send_hostile_frames_is_exact() {
    if !requirements::met() {
        return;
    }
    let site = Site::Multicast;
    let mut testbed = testbed("hostile", site, Some(PATIENT));
    let hosts = testbed.lab().vms().to_vec();
    let (has_begun, is_over) = (AtomicBool::new(false), AtomicBool::new(false));
    let config = RunConfig {
        mover: Mover::Migkick,
        stream: (&LIGHT).into(),
        site,
    };
    thread::scope(|scope| {
        let attackers = [0, 1].map(|host| {
            let (host, has_begun, is_over) = (&hosts[host], &has_begun, &is_over);
            scope.spawn(move || flood(host, has_begun, is_over))
        });
        let end = hostile::EndOf(&is_over);
        let run = measure::run(&mut testbed, &config, &mut |step| {
            eprintln!("{step}");
            if step == measure::RECEIVES {
                has_begun.store(true, Ordering::Relaxed);
            }
        });
        drop(end);
        let sent = attackers.map(|attacker| attacker.join().unwrap());
        eprintln!("{sent:?} hostile frames");
        let row = run.unwrap().row;
        assert!(row.ok, "{row:?}");
        let faults = (row.lost, row.duplicated, row.reordered);
        assert_eq!(faults, (0, 0, 0), "{row:?}");
        assert!(sent.iter().all(|sent| *sent > 1000), "{sent:?}");
    });
    assert_recorded(&mut testbed);
}

/// Returns true if a process of that name has a device open.
fn has_open(name: &str, device: &str) -> bool {
    let entries = |path: PathBuf| std::fs::read_dir(path).into_iter().flatten().flatten();
    entries("/proc".into())
        .map(|process| process.path())
        .filter(|process| {
            std::fs::read_to_string(process.join("comm")).is_ok_and(|comm| comm.trim() == name)
        })
        .flat_map(|process| entries(process.join("fd")))
        .any(|file| std::fs::read_link(file.path()).is_ok_and(|to| to == Path::new(device)))
}

#[test]
fn plain_libvirt_loses_what_a_late_tree_takes() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("migbase", LATE, None);
    let run = moved(&mut testbed, LATE, Mover::Virsh, STREAM);
    assert!(run.row.flows, "{:?}", run.row);
    assert!(run.row.vm_pause_ms > 0.0, "{:?}", run.row);
    assert!(run.row.loss_ms > 1500.0, "{:?}", run.row);
}

#[test]
fn a_guest_that_moves_back_at_once_receives_natively_again() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("migback", Site::Multicast, Some(AgentOptions::DEFAULT));
    let run = moved(&mut testbed, Site::Multicast, Mover::Migkick, STREAM);
    assert!(run.row.flows, "{:?}", run.row);
    let stream = Stream::start(testbed.lab(), &STREAM).unwrap();
    let guest = testbed.guest().unwrap().clone();
    guest
        .start_receiver(RECEIVER, stream::receiver(&STREAM))
        .unwrap();
    guest.wait_arrivals(RECEIVER, 100, MOVE).unwrap();
    // The first two migrations go there and back while the source's tree is being pruned.
    for (number, destination) in (0..).zip(["vms1", "vms2", "vms1"]) {
        let output = guest.run("migkick", &["go", destination], MOVE).unwrap();
        output.into_success().unwrap();
        ensure_runs_only_on(&testbed, destination).unwrap();
        let row = testbed.last_record(1 - number % 2).unwrap();
        assert_eq!(row["receptions"][0]["mode"], "native", "{row}");
        let before = guest.arrivals(RECEIVER).len();
        guest.wait_arrivals(RECEIVER, before + 1000, MOVE).unwrap();
    }
    stream.stop().unwrap();
}

/// Text in the memory of every guest.
const BANNER: &[u8] = b"Linux version 6.";
/// Longer than the agent takes to notice new certificates.
const SEEN: Duration = Duration::from_secs(60);

/// Returns whether an eavesdropper on the copy's path could read the guest's memory when it left
/// `host`, and the record's description of the copy.
fn overheard(testbed: &mut Testbed, host: usize) -> (bool, Value) {
    let (source, destination) = (
        testbed.lab().vms()[host].clone(),
        testbed.lab().vms()[1 - host].name().to_owned(),
    );
    let eavesdropper = Eavesdropper::start(&source, BANNER).unwrap();
    let domain = testbed.domain_name().to_owned();
    let mut command = testbed
        .agents()
        .unwrap()
        .command(&source, &["migrate", &domain, &destination]);
    source.output(&mut command).unwrap();
    let heard = eavesdropper.finish().unwrap();
    eprintln!("{heard:?}");
    assert!(heard.bytes > 10 << 20, "{heard:?}");
    (
        heard.known > 0,
        testbed.last_record(host).unwrap()["memory"].clone(),
    )
}

#[test]
fn memory_is_read_by_nobody_on_its_way_once_qemu_has_certificates() {
    if !requirements::met() {
        return;
    }
    let mut testbed = testbed("migtls", Site::Multicast, Some(AgentOptions::DEFAULT));
    testbed.boot().unwrap();
    let in_the_clear = json!({ "way": "clear", "reason": "no-certificate-here" });
    assert_eq!(overheard(&mut testbed, 0), (true, in_the_clear));

    let hosts = testbed.lab().vms().to_vec();
    for vms in &hosts {
        install_qemu_certificates(testbed.lab(), vms).unwrap();
    }
    wait::until("the agents to see QEMU's certificates", SEEN, || {
        let agents = testbed.agents().ok()?;
        let problems = |vms| {
            agents
                .query(vms, "status")
                .map(|it| it["memory_problems"].clone())
        };
        hosts
            .iter()
            .all(|vms| problems(vms).is_ok_and(|it| it == json!([])))
            .then_some(())
    })
    .unwrap();
    assert_eq!(overheard(&mut testbed, 1), (false, json!({ "way": "tls" })));

    // The destination's certificate now has another CA: the migration fails, and libvirt does not
    // fall back to plaintext.
    let ca = hosts[1].qemu_pki_directory().join("ca-cert.pem");
    std::fs::copy(hosts[1].shared_directory().join("cacert.pem"), ca).unwrap();
    let domain = testbed.domain_name().to_owned();
    let arguments = ["migrate", &domain, hosts[1].name()];
    let mut command = testbed.agents().unwrap().command(&hosts[0], &arguments);
    hosts[0].output(&mut command).unwrap_err();
    assert_eq!(
        testbed.last_record(0).unwrap()["outcome"]["state"],
        "failed"
    );
    ensure_runs_only_on(&testbed, "vms1").unwrap();
}
