//! Nothing of a lab remains, however the lab ends.

#![allow(
    clippy::unwrap_used,
    reason = "a test panics rather than returning an error"
)]

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lab::{Lab, LabConfig, Site, netns, registry, wait};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const DEADLINE: Duration = Duration::from_secs(10);

/// Makes a lab without libvirtd, for tests of the network only.
fn network(name: &str, second: Site) -> Lab {
    let config = LabConfig::new(name);
    Lab::up(LabConfig {
        sites: [Site::Multicast, second],
        libvirtd: false,
        ..config
    })
    .unwrap()
}

#[test]
fn removed_lab_leaves_no_namespace_process_mount_or_directory() {
    if !lab::requirements::met() {
        return;
    }
    let lab = Lab::up(LabConfig::new("testdown")).unwrap();
    let sleeper = lab.vms1().command("sleep");
    let mut sleeper = lab
        .vms1()
        .spawn("sleep", with_argument(sleeper, "600"))
        .unwrap();
    // One router, two hosts with a libvirtd each, and the sleeper once it has entered the
    // namespace.
    let pids = wait::until("the sleeper in its namespace", DEADLINE, || {
        let found = registry::processes("testdown");
        let pids: Vec<i32> = found.iter().map(|found| found.pid).collect();
        pids.iter()
            .any(|pid| u32::try_from(*pid) == Ok(sleeper.id()))
            .then_some(pids)
    })
    .unwrap();
    assert!(pids.len() >= 6, "{pids:?}");
    lab.down().unwrap();
    sleeper.wait(DEADLINE).unwrap();
    assert_nothing_left("testdown");
    wait::until("the processes to be reaped", DEADLINE, || {
        pids.iter()
            .all(|pid| !fs::exists(format!("/proc/{pid}")).unwrap())
            .then_some(())
    })
    .unwrap();
}

fn with_argument(mut command: Command, argument: &str) -> Command {
    command.arg(argument);
    command
}

fn assert_nothing_left(name: &str) {
    assert_eq!(netns::list(&format!("rc{name}-")), Vec::<String>::new());
    assert!(registry::processes(name).is_empty());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&format!("rc{name}-")), "{mounts}");
    assert!(
        !mounts.contains(&registry::directory(name).display().to_string()),
        "{mounts}"
    );
    assert!(!registry::directory(name).exists());
}

/// Helper process, not a test: `killed_lab_is_removed_by_the_next_one` and
/// `interrupted_lab_is_removed` start and end it.
#[test]
#[ignore = "started by other tests"]
fn helper_holds_a_lab() {
    let Ok(name) = std::env::var("LAB_NAME") else {
        return;
    };
    let lab = network(&name, Site::Multicast);
    fs::write(registry::directory(&name).join("held"), "").unwrap();
    let _ = wait::until("the end", Duration::from_secs(60), || None::<()>);
    drop(lab);
}

fn hold_lab(name: &str) -> Child {
    let helper = start_helper(name);
    let held = registry::directory(name).join("held");
    wait::until("the helper's lab", DEADLINE, || held.exists().then_some(())).unwrap();
    helper
}

fn interrupt(helper: &Child) {
    let pid = Pid::from_raw(i32::try_from(helper.id()).unwrap());
    kill(pid, Signal::SIGINT).unwrap();
}

fn start_helper(name: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "lab_removal::helper_holds_a_lab", "--ignored"])
        .env("LAB_NAME", name)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn killed_lab_is_removed_by_the_next_one() {
    if !lab::requirements::met() {
        return;
    }
    let mut helper = hold_lab("testkilled");
    Lab::up(LabConfig::new("testkilled")).map(drop).unwrap_err();
    helper.kill().unwrap();
    helper.wait().unwrap();
    assert!(!registry::processes("testkilled").is_empty());
    let other = network("testnext", Site::Multicast);
    assert_nothing_left("testkilled");
    other.down().unwrap();
}

#[test]
fn lab_interrupted_while_it_is_built_is_removed() {
    if !lab::requirements::met() {
        return;
    }
    let mut helper = start_helper("testearly");
    let router = netns::path("rctestearly-router");
    wait::until("the first namespaces", DEADLINE, || {
        router.exists().then_some(())
    })
    .unwrap();
    interrupt(&helper);
    assert_eq!(helper.wait().unwrap().code(), Some(130));
    assert_nothing_left("testearly");
}

#[test]
fn interrupted_lab_is_removed() {
    if !lab::requirements::met() {
        return;
    }
    let mut helper = hold_lab("testint");
    interrupt(&helper);
    assert_eq!(helper.wait().unwrap().code(), Some(130));
    assert_nothing_left("testint");
}

#[test]
fn second_lab_of_the_same_name_replaces_the_first() {
    if !lab::requirements::met() {
        return;
    }
    let first = network("testtwice", Site::Multicast);
    first.keep().unwrap();
    let attached = Lab::attach("testtwice").unwrap();
    drop(attached);
    assert!(!registry::processes("testtwice").is_empty());
    let second = network("testtwice", Site::Late(7));
    assert_eq!(
        second.router().status().unwrap().sites[1].kind,
        Site::Late(7)
    );
    second.down().unwrap();
    assert_nothing_left("testtwice");
    Lab::attach("testtwice").unwrap_err();
}

#[test]
fn bad_lab_names_are_refused() {
    for name in ["", "Upper", "with-dash", "../etc", "averyverylongname"] {
        Lab::up(LabConfig::new(name)).map(drop).unwrap_err();
    }
}
