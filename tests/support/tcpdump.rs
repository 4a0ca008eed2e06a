//! What tcpdump makes of the packets on an interface: a reader that is not our own.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "a module of several test files, each of which uses a part"
)]
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};

use super::netns::Namespace;

/// A capture that runs.
pub(crate) struct Tcpdump(Child);

impl Tcpdump {
    /// Starts it and waits until it listens.
    pub(crate) fn start(namespace: &Namespace, interface: &str, filter: &str) -> Self {
        let mut child = Command::new("ip")
            .args(["netns", "exec", namespace.name()])
            .args(["tcpdump", "-i", interface])
            .args(["-n", "-vv", "-l", "--immediate-mode", "-s", "2048", filter])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut errors = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("listening on") {
            line.clear();
            assert_ne!(errors.read_line(&mut line).unwrap(), 0, "tcpdump ended");
        }
        Self(child)
    }

    /// Ends it; returns its lines, of which a packet may have several.
    pub(crate) fn lines(self) -> Vec<String> {
        let text = self.finish();
        let lines = text.lines().filter(|line| !line.is_empty());
        lines.map(str::to_owned).collect()
    }

    /// Ends it; returns what it says of each packet.
    pub(crate) fn packets(self) -> Vec<String> {
        let text = self.finish();
        let joined = text.replace("\n\t", " ").replace("\n    ", " ");
        joined.lines().map(str::to_owned).collect()
    }

    fn finish(mut self) -> String {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::SIGINT).unwrap();
        let mut text = String::new();
        let mut output = self.0.stdout.take().unwrap();
        output.read_to_string(&mut text).unwrap();
        self.0.wait().unwrap();
        text
    }
}
