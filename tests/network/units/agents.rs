//! The agent under the restrictions of its unit.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use lab::confine;
use support::agent::{Agent, Files, domain};
use support::host::{self, any_source, join, listeners};
use support::netns::{Namespace, wait_for};
use support::tap::Guest;

use super::systemd::{Systemd, group, possible, unit};

/// Policy rules; without rules, the agent warns that nothing may move.
const RULES: &str = "[[policy.depart]]\ndomains = [\"tv-*\"]\ndestinations = [\"vms2\"]\n\
                     [[policy.arrive]]\nsources = [\"vms2\"]\ndomains = [\"tv-*\"]";
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

/// Starts the agent under the restrictions of its unit, and waits until it has seen its domains.
fn start(files: &Files, bpffs: &Path, systemd: &Systemd) -> Agent {
    let directory = files.path("");
    let command = systemd.command(&[&directory, bpffs], "roamcast");
    let mut agent = files.spawn_by(command, files.log_file());
    wait_for("the agent", || {
        let ended = agent.child.try_wait().unwrap();
        assert!(ended.is_none(), "{ended:?}: {}", agent.log());
        (files.status()?["hypervisor"]["state"] == "up").then_some(())
    });
    agent
}

#[test]
fn agent_attaches_adopts_and_knows_what_a_vm_listens_to() {
    if !possible() {
        return;
    }
    let (host, network) = (Namespace::new("host"), Namespace::new("network"));
    host.add_bridge("br0");
    host.add_peer("br0", "up0", &network, "n0");
    let guest = Guest::start(&host, "br0", "tap0", 0);
    host.run_with_bpffs(|bpffs| {
        let files = Files::new(bpffs, &[domain("tv-1", 1, "tap0", MAC)], RULES);
        let mut systemd = Systemd::new("roamcast", &files.path(""));
        let agent = start(&files, bpffs, &systemd);
        let mut sockets = listeners(&guest);
        join(&guest, &mut sockets, &any_source(1));
        let wanted = host::group(1).to_string();
        let is_known = || {
            let rows = files.query("listeners")?;
            let mut rows = rows.as_array()?.iter();
            rows.any(|row| row["multicast_address"] == *wanted)
                .then_some(())
        };
        wait_for("the listener", is_known);
        systemd.wait();
        drop(agent);

        let agent = start(&files, bpffs, &systemd);
        wait_for("the listener again", is_known);
        wait_for("the domain", || {
            (files.status()?["ports"][0]["domain"] == "tv-1").then_some(())
        });
        let table = files.table();
        for program in ["snoop by", "gate by", "uplink by", "leak by"] {
            assert!(table.contains(program), "{table}");
        }
        let log = agent.log();
        for word in ["WARN", "ERROR"] {
            assert!(!log.contains(word), "{log}");
        }
    });
}

/// A process of another user, like QEMU; dropping the value kills the process.
struct Other(Child);

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn agent_sees_what_the_process_of_another_user_has_open_and_does() {
    if !possible() {
        return;
    }
    let child = Command::new("setpriv")
        .args(["--reuid=64055", "--regid=64055", "--clear-groups", "sleep"])
        .arg("600")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let other = Other(child);
    let process = format!("/proc/{}", other.0.id());
    wait_for("the other user", || {
        let name = std::fs::read_to_string(format!("{process}/comm")).ok()?;
        (name == "sleep\n").then_some(())
    });
    // The script reads the same files as `hypervisor::main_loop` reads of a QEMU process.
    let script = format!(
        "cd {process} && readlink ns/net && cat fdinfo/0 && readlink fd/0 && cat stat syscall && echo all"
    );
    let (unit, group) = (unit("roamcast"), group("roamcast"));
    let mut command = confine::command(&unit, &group, &[], Path::new("/bin/sh")).unwrap();
    let output = command.args(["-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.ends_with("all\n"), "{output:?}");
}
