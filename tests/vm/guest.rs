//! A guest under plain QEMU in its own namespace: it boots, runs programs, receives streams, and
//! keeps its control channel through a live migration.

#![allow(clippy::unwrap_used, reason = "helpers of tests may panic like tests")]

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    time::Duration,
};

use lab::{
    guest::{
        control::{Control, HostSocket},
        domain::Accelerator,
        image,
        qemu::{Qemu, QemuConfig},
        wire::{Content, Filter, Join, ReceiverConfig},
    },
    probe::{
        clock, log,
        metrics::{self, Window},
        report::SenderSummary,
    },
};

const BOOT_DEADLINE: Duration = Duration::from_secs(120);
const DEADLINE: Duration = Duration::from_secs(60);
const STREAM: &str = "ff3e::4d:1";
const PORT: u16 = 5004;

/// A namespace with bridge `br0` and two TAPs, removed at the end.
struct Network {
    namespace: String,
}

impl Network {
    /// Returns `None` if the system permits no namespaces or TAPs; fails in CI instead.
    fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let namespace = format!("rcg{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed));
        if !ip(&["netns", "add", &namespace]) {
            assert!(std::env::var_os("CI").is_none(), "Namespaces need root");
            println!("skipped: namespaces need root");
            return None;
        }
        let network = Self { namespace };
        network.ip("link add br0 type bridge mcast_snooping 0");
        network.ip("addr add fd00:4d::1/64 dev br0 nodad");
        network.ip("link set br0 up");
        for tap in ["tap0", "tap1"] {
            network.ip(&format!("tuntap add {tap} mode tap"));
            network.ip(&format!("link set {tap} master br0 up"));
        }
        Some(network)
    }

    fn ip(&self, words: &str) {
        let mut args = vec!["-n", &self.namespace];
        args.extend(words.split(' '));
        assert!(ip(&args), "ip {words} failed");
    }

    fn launcher(&self) -> [&str; 4] {
        ["ip", "netns", "exec", &self.namespace]
    }

    fn sender(&self, log: &Path, args: &str) -> Child {
        Command::new("ip")
            .args([
                "netns",
                "exec",
                &self.namespace,
                env!("CARGO_BIN_EXE_sender"),
            ])
            .args([STREAM, "--interface", "br0", "--log"])
            .arg(log)
            .args(args.split(' '))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        ip(&["netns", "del", &self.namespace]);
    }
}

fn ip(args: &[&str]) -> bool {
    Command::new("ip")
        .args(args)
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|it| it.success())
}

fn config(directory: &Path, host: &str, tap: &str) -> QemuConfig {
    QemuConfig {
        image: image::ensure(&image::default_directory()).unwrap(),
        accelerator: Accelerator::Tcg,
        memory_mib: 128,
        taps: vec![(tap.to_owned(), [0x52, 0x54, 0, 0x4d, 1, 0])],
        control: socket(directory, host).path,
        directory: directory.to_owned(),
        name: host.to_owned(),
        incoming: None,
    }
}

fn socket(directory: &Path, host: &str) -> HostSocket {
    HostSocket {
        host: host.to_owned(),
        path: directory.join(format!("{host}.sock")),
    }
}

fn receiver(joins: Vec<Join>) -> ReceiverConfig {
    ReceiverConfig {
        interface: "eth0".into(),
        port: PORT,
        joins,
        content: Content::Stamped,
    }
}

/// Sends in `network`. Returns the summary and the path of the log in `directory`.
fn send(network: &Network, directory: &Path, args: &str) -> (SenderSummary, PathBuf) {
    let path = directory.join("sender.log");
    let output = network.sender(&path, args).wait_with_output().unwrap();
    assert!(output.status.success());
    (serde_json::from_slice(&output.stdout).unwrap(), path)
}

#[test]
fn guest_runs_programs_and_receives_the_papers_stream_without_loss() {
    let Some(network) = Network::new() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let control = Control::listen(&[socket(directory, "vms1")]).unwrap();
    let started = clock::now_ns();
    let _qemu = Qemu::start(&network.launcher(), &config(directory, "vms1", "tap0")).unwrap();
    assert_eq!(control.wait_ready(BOOT_DEADLINE).unwrap(), "vms1");
    println!("ready after {} ms", (clock::now_ns() - started) / 1_000_000);

    let output = control
        .run("sh", &["-c", "echo out; echo err >&2; exit 3"], DEADLINE)
        .unwrap();
    assert_eq!(
        (output.stdout().as_str(), output.stderr().as_str()),
        ("out\n", "err\n")
    );
    assert_eq!(output.code, Some(3));
    let error = control.spawn("no-such-program", &[]).err().unwrap();
    assert!(error.to_string().contains("no-such-program"), "{error:#}");
    let help = control.run("migkick", &["--help"], DEADLINE).unwrap();
    assert_eq!(help.code, Some(0), "{}", help.stderr());

    // The sender's rate and load depend on the machine; losing nothing is the guest's part.
    for (number, args) in [(1, "--duration 4"), (2, "--duration 4 --rate 8600")] {
        let joins = vec![Join::any_source(STREAM.parse().unwrap())];
        control.start_receiver(number, receiver(joins)).unwrap();
        let (summary, path) = send(&network, directory, args);
        let sent = log::read(&path).unwrap();
        assert_eq!(sent.len() as u64, summary.flows[0].sent);
        if let Err(error) = control.wait_arrivals(number, sent.len(), DEADLINE) {
            panic!("{error}: {:?}, {:?}", control.status(), control.stats());
        }
        let window = Window {
            from_ns: summary.start_ns,
            to_ns: summary.last_ns + 1,
        };
        let metrics = metrics::compute(&sent, &control.arrivals(number), window);
        println!("{metrics:?}");
        assert_eq!(
            (metrics.lost, metrics.duplicated, metrics.reordered),
            (0, 0, 0)
        );
        control.stop_receiver(number).unwrap();
    }
    let status = control.status().unwrap();
    println!("{status:?} {:?}", control.stats());
}

#[test]
fn receiver_joins_a_thousand_addresses_and_filters_sources() {
    let Some(network) = Network::new() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let control = Control::listen(&[socket(directory, "vms1")]).unwrap();
    let _qemu = Qemu::start(&network.launcher(), &config(directory, "vms1", "tap0")).unwrap();
    control.wait_ready(BOOT_DEADLINE).unwrap();

    let stream = STREAM.parse().unwrap();
    let many = Join {
        count: 1000,
        ..Join::any_source(stream)
    };
    control.start_receiver(1, receiver(vec![many])).unwrap();
    let addresses = control
        .run("grep", &["-c", "ff3e.*4d", "/proc/net/igmp6"], DEADLINE)
        .unwrap();
    let listed = addresses.stdout();
    assert!(listed.trim().parse::<u32>().unwrap() >= 1000, "{listed}");
    let (summary, path) = send(&network, directory, "--duration 2 --rate 2000 --flows 1000");
    let sent = log::read(&path).unwrap();
    control.wait_arrivals(1, sent.len(), DEADLINE).unwrap();
    let window = Window {
        from_ns: summary.start_ns,
        to_ns: summary.last_ns + 1,
    };
    let metrics = metrics::compute(&sent, &control.arrivals(1), window);
    assert_eq!((metrics.lost, metrics.duplicated), (0, 0));
    control.stop_receiver(1).unwrap();

    let source = "fd00:4d::1".parse().unwrap();
    let other = "fd00:4d::2".parse().unwrap();
    let filters = [
        (2, Filter::Include(vec![source]), true),
        (3, Filter::Include(vec![other]), false),
        (4, Filter::Exclude(vec![other]), true),
        (5, Filter::Exclude(vec![source]), false),
    ];
    for (number, filter, shall_receive) in filters {
        let text = format!("{filter:?}");
        let join = Join {
            multicast_address: stream,
            count: 1,
            filter,
        };
        control
            .start_receiver(number, receiver(vec![join]))
            .unwrap();
        // A packet that passes no filter shows that the stream arrived before.
        let last = Join::any_source("ff3e::4d:2".parse().unwrap());
        control
            .start_receiver(100 + number, receiver(vec![last]))
            .unwrap();
        send(&network, directory, "--duration 0.2 --rate 100 --flows 2");
        control.wait_arrivals(100 + number, 10, DEADLINE).unwrap();
        control.status().unwrap();
        assert_eq!(
            !control.arrivals(number).is_empty(),
            shall_receive,
            "{text}"
        );
        control.stop_receiver(number).unwrap();
        control.stop_receiver(100 + number).unwrap();
    }
}

#[test]
fn control_channel_follows_a_live_migration() {
    let Some(network) = Network::new() else {
        return;
    };
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let sockets = ["vms1", "vms2"].map(|host| socket(directory, host));
    let control = Control::listen(&sockets).unwrap();
    let source = Qemu::start(&network.launcher(), &config(directory, "vms1", "tap0")).unwrap();
    control.wait_ready(BOOT_DEADLINE).unwrap();
    let uri = format!("unix:{}", directory.join("migration").display());
    let mut incoming = config(directory, "vms2", "tap1");
    incoming.incoming = Some(uri.clone());
    let destination = Qemu::start(&network.launcher(), &incoming).unwrap();

    let joins = vec![Join::any_source(STREAM.parse().unwrap())];
    control.start_receiver(1, receiver(joins)).unwrap();
    let log_path = directory.join("sender.log");
    let mut sender = network.sender(&log_path, "--rate 1725");
    control.wait_arrivals(1, 1000, DEADLINE).unwrap();
    source.migrate(&uri, DEADLINE).unwrap();
    control.wait_host("vms2", DEADLINE).unwrap();
    let arrived = control.arrivals(1).len();
    control.wait_arrivals(1, arrived + 3000, DEADLINE).unwrap();
    let status = control.status().unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(sender.id()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    sender.wait().unwrap();
    drop((source, destination));

    let sent = log::read(&log_path).unwrap();
    let arrivals = control.arrivals(1);
    let window = Window {
        from_ns: arrivals[0].host_ns,
        to_ns: arrivals[arrived].host_ns,
    };
    let metrics = metrics::compute(&sent, &arrivals, window);
    let stats = control.stats();
    println!("{metrics:?} {stats:?} {status:?}");
    assert_eq!(stats.missing, 0, "{stats:?}");
    assert_eq!(status.receivers[0].overflowed, 0);
    let hosts: Vec<_> = arrivals.iter().map(|arrival| arrival.host).collect();
    assert!(hosts.is_sorted() && hosts.contains(&0) && hosts.contains(&1));
    // The guest's clock is set to the host's before and after the pause, so no packet arrives
    // before it was sent.
    let sent: std::collections::HashMap<_, _> =
        sent.iter().map(|it| (it.sequence, it.sent_ns)).collect();
    for arrival in &arrivals {
        let sent_ns = sent[&arrival.sequence];
        assert!(
            arrival.host_ns >= sent_ns,
            "{arrival:?} was sent at {sent_ns}"
        );
    }
    assert_eq!(control.stops().len(), 1, "the clock stood still once");
}
