//! Attacks on the agent's log: a reader that stalls or vanishes, and names that forge lines or
//! terminal escape sequences.

use std::fs::File;
use std::io::{PipeReader, Read as _, Write as _, pipe};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::process::Stdio;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde_json::Value;
use support::agent::{Agent, Files};
use support::netns::{Namespace, privileged, wait_for};

/// Configuration that logs every event.
const DEBUG: &str = "[log]\nlevel = \"debug\"";
/// Valid interface name with an escape sequence and a bidirectional override.
const NAME: &str = "v\u{1b}[2J\u{202e}x";
const SHOWN: &str = "v\\u{1b}[2J\\u{202e}x";

/// Runs the real agent on a bridge, with its log in a pipe.
fn logging(work: impl FnOnce(&Namespace, &Files, &mut Agent, Log) + Send) {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    host.run_with_bpffs(|bpffs: &Path| {
        let files = Files::new(bpffs, &[], DEBUG);
        let (reader, writer) = pipe().unwrap();
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        // A second, non-blocking file for the same pipe.
        let other = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", writer.as_raw_fd()))
            .unwrap();
        let mut agent = Agent::start_with(&files, Stdio::from(OwnedFd::from(writer)));
        work(&host, &files, &mut agent, Log { reader, other });
    });
}

struct Log {
    reader: PipeReader,
    other: File,
}

impl Log {
    /// Fills the pipe.
    fn fill(&mut self) {
        while self.other.write(&[b'x'; 512]).is_ok() {}
        while self.other.write(b"x").is_ok() {}
    }

    /// Reads the available text.
    fn read(&mut self, text: &mut String) {
        let mut buffer = [0; 4096];
        while let Ok(length @ 1..) = self.reader.read(&mut buffer) {
            text.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }
}

/// Adds and removes a TAP, which the agent logs.
fn plug(host: &Namespace, files: &Files, name: &str) -> Value {
    host.ip(&format!("tuntap add {name} mode tap"));
    host.ip(&format!("link set {name} master br0 up"));
    let has = |status: &Value| {
        let ports = status["ports"].as_array().unwrap();
        ports.iter().any(|port| port["name"] == name)
    };
    let status = wait_for("the TAP in the status", || files.status().filter(has));
    host.ip(&format!("tuntap del {name} mode tap"));
    wait_for("no TAP in the status", || {
        files.status().filter(|it| !has(it))
    });
    status
}

fn dropped(status: &Value) -> u64 {
    status["counters"]["log_lines_dropped"]
        .as_u64()
        .unwrap_or(0)
}

#[test]
fn agent_whose_log_nobody_reads_goes_on() {
    logging(|host, files, agent, mut log| {
        log.fill();
        for number in 0..5 {
            plug(host, files, &format!("vnet{number}"));
        }
        assert!(agent.child.try_wait().unwrap().is_none());
        // The waiting lines arrive once the pipe is read again.
        let mut text = String::new();
        wait_for("the last TAP in the log", || {
            log.read(&mut text);
            text.contains("vnet4").then_some(())
        });
        assert!(text.contains("vnet0"), "{text}");
    });
}

#[test]
fn agent_whose_log_reader_has_gone_goes_on() {
    logging(|host, files, agent, log| {
        drop(log);
        let mut number = 0;
        let lost = wait_for("a dropped line", || {
            number += 1;
            let status = plug(host, files, &format!("vnet{number}"));
            Some(dropped(&status)).filter(|it| *it > 0)
        });
        assert!(agent.child.try_wait().unwrap().is_none());
        let status = plug(host, files, "vnet0");
        assert!(dropped(&status) > lost, "{status}");
    });
}

#[test]
fn name_of_an_interface_is_escaped_in_log_and_tables() {
    logging(|host, files, _agent, mut log| {
        let mut text = String::new();
        host.ip(&format!("tuntap add {NAME} mode tap"));
        host.ip(&format!("link set {NAME} master br0 up"));
        let table = wait_for("the TAP in the table", || {
            log.read(&mut text);
            let table = files.table();
            table.contains("[2J").then_some(table)
        });
        host.ip(&format!("tuntap del {NAME} mode tap"));
        wait_for("the TAP in the log", || {
            log.read(&mut text);
            (text.contains("[2J") && text.contains("TAP removed")).then_some(())
        });
        for shown in [table, text] {
            assert!(shown.contains(SHOWN), "{shown:?}");
            assert!(!shown.contains(['\u{1b}', '\u{202e}']), "{shown:?}");
        }
    });
}
