//! `roamcast ims` as a process: acknowledged updates survive `kill -9`, replicas work
//! independently, and each error is one sentence.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests may panic like tests"
)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::mat::message::Outcome;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use support::ims::{Files, HOME, Node, Server, hoa, moa};
use support::netns::{Namespace, privileged, wait_for};

const PORT: u16 = 47413;

/// A namespace for servers and nodes, and a directory for their files.
struct World {
    namespace: Namespace,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        Self {
            namespace: Namespace::new("ims"),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn files(&self, name: &str, port: u16) -> Files {
        Files::new(&self.directory.path().join(name), port, "")
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.namespace.run(work)
    }
}

/// Starts a server in this namespace and waits until it answers.
fn start(files: &Files) -> Server {
    let server = Server::spawn(files);
    wait_for("the server", || files.status());
    server
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}

#[test]
fn no_acknowledged_update_is_lost_by_kill_9() {
    if !privileged() {
        return;
    }
    const NODES: u32 = 24;
    let world = World::new();
    let files = world.files("a", PORT);
    world.run(|| {
        let acknowledged: Vec<AtomicU64> = (0..NODES).map(|_| AtomicU64::new(0)).collect();
        for round in 1..=5 {
            let mut server = start(&files);
            let stop = AtomicBool::new(false);
            let total = AtomicU64::new(0);
            std::thread::scope(|scope| {
                let mut nodes = Vec::new();
                for (number, last) in (0..NODES).zip(&acknowledged) {
                    let mut node = Node::new(number, 1, PORT);
                    let (stop, total) = (&stop, &total);
                    nodes.push(move || {
                        let mut sequence = last.load(Ordering::SeqCst) + 1;
                        while !stop.load(Ordering::SeqCst) {
                            let patience = Duration::from_secs(5);
                            let Ok(reply) = node.try_update(sequence, patience) else {
                                continue;
                            };
                            if reply.outcome == Outcome::Accepted as u8 {
                                last.store(sequence, Ordering::SeqCst);
                                total.fetch_add(1, Ordering::SeqCst);
                            }
                            // The server may have stored an update without acknowledging it before
                            // it died.
                            sequence = reply.sequence + 1;
                        }
                    });
                }
                // The sockets above already belong to this namespace.
                for node in nodes {
                    scope.spawn(node);
                }
                wait_for("updates", || {
                    (total.load(Ordering::SeqCst) >= 200 * round).then_some(())
                });
                server.kill();
                stop.store(true, Ordering::SeqCst);
            });
            let server = start(&files);
            let mut reader = Node::new(999, 1, PORT);
            for (number, last) in (0..NODES).zip(&acknowledged) {
                let last = last.load(Ordering::SeqCst);
                let mapping = reader.lookup(number).mapping.expect("a mapping");
                assert!(
                    mapping.sequence >= last,
                    "node {number}: {} after {last} was acknowledged",
                    mapping.sequence
                );
                let address = moa(number, mapping.sequence).octets();
                assert_eq!(*mapping.moas[0].address, address, "node {number}");
            }
            drop(server);
        }
    });
}

#[test]
fn mapping_outlives_a_restart_with_the_lifetime_that_is_left() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let files = world.files("a", PORT);
    world.run(|| {
        let server = start(&files);
        let mut node = Node::new(1, 1, PORT);
        let reply = node.update(5);
        assert_eq!(reply.outcome, 0);
        // The lifetime left at the time of storing.
        assert!((590..=600).contains(&reply.lifetime_s), "{reply:?}");
        assert_eq!(server.stop(), Some(0));
        // Without a server, the command reads the store.
        let [row] = &files.list()[..] else {
            panic!("one node");
        };
        assert_eq!(row["hoa"], hoa(1).to_string());
        assert_eq!(row["sequence"], 5);
        let left = row["lifetime_left_ms"].as_u64().unwrap();
        assert!((500_000..=600_000).contains(&left), "{left}");
        let _server = start(&files);
        let mapping = Node::new(2, 1, PORT).lookup(1).mapping.unwrap();
        assert_eq!(mapping.sequence, 5);
        assert_eq!(node.update(5).outcome, 0, "repeated");
        assert_eq!(node.update(4).outcome, Outcome::OldSequence as u8);
        let status = files.status().unwrap();
        assert_eq!(status["nodes"], 2);
        assert_eq!(status["mappings"], 1);
        assert_eq!(status["counters"]["updates_old_sequence"], 1);
        assert_eq!(files.list().len(), 2);
    });
}

#[test]
fn replicas_work_by_themselves_and_learn_of_a_new_key_from_its_node() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let (first, second) = (world.files("a", PORT), world.files("b", PORT + 1));
    world.run(|| {
        let mut servers = [start(&first), start(&second)];
        let key_file = first.path("node1.toml");
        let enroll = |files: &Files| {
            let path = key_file.to_str().unwrap();
            let output = files.run(&["enroll", &hoa(1).to_string(), "--output", path]);
            assert!(output.status.success(), "{output:?}");
        };
        enroll(&first);
        for port in [PORT, PORT + 1] {
            assert_eq!(Node::new(1, 1, port).update(1).outcome, 0);
        }
        let at_second = Node::new(2, 1, PORT + 1).lookup(1);
        assert_eq!(Node::new(2, 1, PORT).lookup(1), at_second);

        // The first server makes a new key; the second learns of the key when the node uses it.
        fs::remove_file(&key_file).unwrap();
        enroll(&first);
        assert!(!Node::new(1, 1, PORT).is_answered());
        assert!(Node::new(1, 1, PORT + 1).is_answered());
        for port in [PORT, PORT + 1] {
            assert_eq!(Node::new(1, 2, port).update(1).outcome, 0);
            assert!(!Node::new(1, 1, port).is_answered());
        }
        assert_eq!(second.list()[0]["generation"], 2);
        let status = second.status().unwrap();
        assert_eq!(status["counters"]["old_keys"], 1);

        servers[0].kill();
        assert!(!Node::new(2, 1, PORT).is_answered());
        let mapping = Node::new(2, 1, PORT + 1).lookup(1).mapping.unwrap();
        assert_eq!(mapping.sequence, 1);
    });
}

#[test]
fn enrollment_makes_a_private_key_file_with_and_without_a_server() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let files = world.files("a", PORT);
    world.run(|| {
        let address = hoa(7).to_string();
        let path = files.path("node7.toml");
        let enroll = |more: &[&str]| {
            let mut arguments = vec!["enroll", &address, "--output", path.to_str().unwrap()];
            arguments.extend(more);
            files.run(&arguments)
        };
        let generation = || {
            let text = fs::read_to_string(&path).unwrap();
            assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
            let key = text.lines().find_map(|it| it.strip_prefix("key = \""));
            assert_eq!(key.unwrap().len(), 65, "{text}");
            assert!(text.contains(&format!("hoa = \"{address}\"\n")), "{text}");
            assert!(text.contains(&format!("home = \"{HOME}\"\n")), "{text}");
            let line = text.lines().find_map(|it| it.strip_prefix("generation = "));
            line.unwrap().parse::<u32>().unwrap()
        };
        assert!(enroll(&[]).status.success());
        assert_eq!(generation(), 1);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("servers = [\"[::1]:47413\"]\n"), "{text}");

        // An existing key file stays unchanged, and its key stays valid.
        let refused = enroll(&[]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(said(&refused).starts_with("Cannot make the key file"));
        assert_eq!(files.list()[0]["generation"], 1);

        let _server = start(&files);
        assert!(Node::new(7, 1, PORT).is_answered());
        fs::remove_file(&path).unwrap();
        let servers = "[2001:db8::1]:47413,[2001:db8::2]:47413";
        let more = ["--servers", servers, "--home", "fd5e:6d61:74::/64"];
        let output = enroll(&more);
        assert!(output.status.success(), "{output:?}");
        let text = fs::read_to_string(&path).unwrap();
        let expected = "home = \"fd5e:6d61:74::/64\"\n\
                        servers = [\"[2001:db8::1]:47413\", \"[2001:db8::2]:47413\"]\n";
        assert!(text.ends_with(expected), "{text}");
        assert!(!Node::new(7, 1, PORT).is_answered());
        assert!(Node::new(7, 2, PORT).is_answered());

        // The same key again, on standard output.
        let again = files.run(&["enroll", &address, "--generation", "2"]);
        assert!(String::from_utf8_lossy(&again.stdout).contains("generation = 2\n"));
        assert!(Node::new(7, 2, PORT).is_answered());
        for (arguments, expected) in [
            (
                vec!["enroll", "2001:db8::7"],
                "2001:db8::7 cannot be a HoA: it is not in the home prefix fd5e:6d61:74::/48",
            ),
            (
                vec!["enroll", &address, "--generation", "1"],
                "was replaced; the server knows 2",
            ),
            (
                vec!["enroll", &address, "--home", "fd00::/48"],
                "fd00::/48 is not in the home prefix fd5e:6d61:74::/48 of this server",
            ),
            (
                vec!["enroll", &address, "--servers", "[::]:1"],
                "Nodes cannot send to [::]:1",
            ),
        ] {
            let output = files.run(&arguments);
            assert_eq!(output.status.code(), Some(1), "{arguments:?}");
            assert!(said(&output).contains(expected), "{}", said(&output));
        }
        assert_eq!(files.list()[0]["generation"], 2);
    });
}

#[test]
fn server_that_cannot_start_says_why_in_one_sentence() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let (files, other) = (world.files("a", PORT), world.files("b", PORT));
    world.run(|| {
        let secret = files.path("ims.secret");
        let refuse = |files: &Files, expected: &str| {
            let output = files.run(&[]);
            assert_eq!(output.status.code(), Some(1), "{expected}");
            let said = said(&output);
            let last = said.lines().last().unwrap_or_default();
            assert!(last.contains(expected), "{said}");
        };
        fs::remove_file(&secret).unwrap();
        refuse(&files, "There is no secret in");
        assert!(files.run(&["init"]).status.success());
        assert_eq!(fs::metadata(&secret).unwrap().mode() & 0o777, 0o600);
        let again = files.run(&["init"]);
        assert!(said(&again).contains("holds a secret already"));
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o644)).unwrap();
        refuse(&files, "can be read by others (mode 644)");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();

        let check = files.run(&["--check"]);
        assert_eq!(check.stdout, b"OK\n");
        files.configure("[mapping]\nmin_lifetime_s = 0\n");
        refuse(&files, "mapping.min_lifetime_s: 0 is not in 1 to 86400");
        files.configure("");

        let _server = start(&files);
        refuse(&other, "Cannot listen on [::]:47413 (UDP)");
        let same_store = Files::new(&files.directory, PORT + 1, "");
        refuse(&same_store, "ims.redb is in use by another process");
    });
}

/// Mounts a small file system for the caller's threads and processes.
fn mount_small(path: &Path) {
    fs::create_dir_all(path).unwrap();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    mount(
        Some("ims"),
        path,
        Some("tmpfs"),
        MsFlags::empty(),
        Some("size=8m"),
    )
    .unwrap();
}

#[test]
fn full_disk_refuses_updates_and_answers_lookups_until_there_is_room() {
    if !privileged() {
        return;
    }
    let world = World::new();
    let files = world.files("a", PORT);
    world.run(|| {
        mount_small(&files.path("store"));
        let _server = start(&files);
        let mut node = Node::new(1, 1, PORT);
        assert_eq!(node.update(1).outcome, 0);
        let filler = files.path("store/filler");
        // The write ends when the file system is full.
        let full = fs::write(&filler, vec![0; 16 << 20]);
        assert!(full.is_err());
        let mut others = 100;
        let (failed, sequence) = wait_for("a refusal", || {
            // Each new node makes the store grow, until the file system is full.
            others += 1;
            let reply = Node::new(others, 1, PORT).update(1);
            (reply.outcome != 0).then_some((reply.outcome, reply.sequence))
        });
        assert_eq!((failed, sequence), (Outcome::Failed as u8, 0));
        assert_eq!(node.lookup(1).mapping.unwrap().sequence, 1);
        assert!(files.status().unwrap()["store_error"].is_string());
        fs::remove_file(&filler).unwrap();
        let mut reader = Node::new(2, 1, PORT);
        wait_for("room", || {
            let reply = Node::new(others, 1, PORT).update(1);
            (reply.outcome == 0).then_some(())
        });
        assert_eq!(reader.lookup(others).mapping.unwrap().sequence, 1);
        assert!(files.status().unwrap()["store_error"].is_null());
    });
}
