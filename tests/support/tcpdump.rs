//! tcpdump's view of the packets on an interface, as an independent parser.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use super::netns::{Namespace, wait_for};

/// A running capture.
pub struct Tcpdump {
    child: Child,
    text: Arc<Mutex<String>>,
    reader: JoinHandle<()>,
}

impl Tcpdump {
    /// Starts tcpdump and waits until it captures.
    pub fn start(namespace: &Namespace, interface: &str, filter: &str) -> Self {
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
        let text: Arc<Mutex<String>> = Arc::default();
        let output = BufReader::new(child.stdout.take().unwrap());
        let reader = thread::spawn({
            let text = Arc::clone(&text);
            move || {
                for line in output.lines() {
                    let line = line.unwrap() + "\n";
                    text.lock().unwrap().push_str(&line);
                }
            }
        });
        Self {
            child,
            text,
            reader,
        }
    }

    /// Waits until tcpdump has printed a text.
    pub fn wait_until_it_says(&self, what: &str) {
        wait_for(what, || {
            self.text.lock().unwrap().contains(what).then_some(())
        });
    }

    /// Ends the capture. Returns the output lines; a packet may have several.
    pub fn lines(self) -> Vec<String> {
        let text = self.finish();
        let lines = text.lines().filter(|line| !line.is_empty());
        lines.map(str::to_owned).collect()
    }

    /// Ends the capture. Returns the output per packet.
    pub fn packets(self) -> Vec<String> {
        let text = self.finish();
        let joined = text.replace("\n\t", " ").replace("\n    ", " ");
        joined.lines().map(str::to_owned).collect()
    }

    fn finish(mut self) -> String {
        let stat = format!("/proc/{}/stat", self.child.id());
        // Each packet wakes tcpdump, so a sleeping tcpdump has read all packets.
        wait_for("tcpdump to read what has come", || {
            let text = std::fs::read_to_string(&stat).unwrap();
            let (_, rest) = text.rsplit_once(')').unwrap();
            rest.trim_start().starts_with('S').then_some(())
        });
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::SIGINT).unwrap();
        self.child.wait().unwrap();
        self.reader.join().unwrap();
        std::mem::take(&mut self.text.lock().unwrap())
    }
}
