//! Checks that the restrictions of the other tests really take effect.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output};

use lab::confine;

use super::systemd::{group, possible, unit};

const SIGSYS: i32 = 31;

fn run(name: &str, script: &str) -> Output {
    let group = group(name);
    let bash = Path::new("/bin/bash");
    let mut command = confine::command(&unit(name), &group, &[], bash).unwrap();
    command.args(["-c", script]).output().unwrap()
}

fn printed(name: &str, script: &str) -> String {
    let output = run(name, script);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn service_has_the_user_capabilities_and_mask_of_its_unit() {
    if !possible() {
        return;
    }
    let show = "umask; while read -r key value _; do case $key in Uid:|CapEff:|CapBnd:|NoNewPrivs:|Seccomp:) \
                echo $key $value;; esac; done < /proc/self/status";
    let bits = |numbers: &[u32]| {
        let set = numbers.iter().fold(0_u64, |set, number| set | 1 << number);
        format!("{set:016x}")
    };
    // 2 DAC_READ_SEARCH, 12 NET_ADMIN, 13 NET_RAW, 19 SYS_PTRACE, 38 PERFMON, 39 BPF.
    let relay = bits(&[12, 38, 39]);
    let agent = bits(&[2, 12, 13, 19, 38, 39]);
    let node = bits(&[12, 13, 38, 39]);
    let none = bits(&[]);
    let nobody = confine::DYNAMIC_USER.to_string();
    for (name, user, capabilities) in [
        ("roamcast", "0", &agent),
        ("migkick-node", "0", &node),
        ("roamcast-relay", &*nobody, &relay),
        ("roamcast-mcs", &*nobody, &none),
        ("roamcast-ims", &*nobody, &none),
    ] {
        let expected = format!(
            "0077\nUid: {user}\nCapEff: {capabilities}\nCapBnd: {capabilities}\nNoNewPrivs: 1\nSeccomp: 2\n"
        );
        assert_eq!(printed(name, show), expected, "{name}");
    }
}

#[test]
fn what_a_unit_refuses_is_refused() {
    if !possible() {
        return;
    }
    for name in [
        "roamcast",
        "migkick-node",
        "roamcast-relay",
        "roamcast-mcs",
        "roamcast-ims",
    ] {
        let output = run(name, "exec chroot /");
        assert_eq!(output.status.signal(), Some(SIGSYS), "{name}: {output:?}");
        let writes = "for path in /etc/x /run/x /proc/sys/kernel/sysrq /sys/x; do \
                      if echo 1 2> /dev/null > $path; then echo $path; fi; done";
        assert_eq!(printed(name, writes), "", "{name}");
        let output = run(name, "exec unshare --user true");
        assert!(!output.status.success(), "{name}: {output:?}");
        assert_eq!(printed(name, "echo /dev/[km]*"), "/dev/[km]*\n", "{name}");
    }
    let sysctl = "echo 1 > /proc/sys/net/ipv6/conf/lo/forwarding && echo done";
    let mut command = Command::new("unshare");
    command.args(["--net", "--"]);
    let (unit, group) = (unit("roamcast-relay"), group("roamcast-relay"));
    let confined = confine::command(&unit, &group, &[], Path::new("/bin/bash")).unwrap();
    command
        .arg(confined.get_program())
        .args(confined.get_args());
    let output = command.args(["-c", sysctl]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "done\n",
        "{output:?}"
    );
}

#[test]
fn service_that_wants_more_memory_or_tasks_than_its_unit_gives_does_not_get_them() {
    if !possible() {
        return;
    }
    // The unit with the tightest limits: 512 MiB and 16 tasks.
    let name = "migkick-node";
    // One line without a newline, so the whole line is in memory.
    let takes = |mebibytes: u32| {
        let script = format!(
            "x=$(head -c {mebibytes}M /dev/zero | tr '\\0' x | tail -n 1 | wc -c); echo $x"
        );
        printed(name, &script)
    };
    assert_eq!(takes(64), format!("{}\n", 64 << 20));
    assert_eq!(takes(600), "0\n");
    let group = group(name);
    let mut command = confine::command(&unit(name), &group, &[], Path::new("/bin/dash")).unwrap();
    let script =
        "n=0; while [ $n -lt 40 ]; do sleep 60 > /dev/null 2>&1 & n=$((n+1)); echo $n; done";
    let output = command.args(["-c", script]).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout).lines().count(),
        15,
        "{output:?}"
    );
    assert!(group.times_met().unwrap() > 0);
}
