//! The program `roamcast agent` on a bridge in a namespace, with invented domains in libvirt's
//! `test` driver.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use lab::binaries;
use roamcast::net::tls::TlsFiles;
use roamcast::pki::{self, IssueRequest, Validity};
use roamcast::role::Role;
use serde_json::Value;
use tempfile::TempDir;

use super::liar::Liar;
use super::netns::wait_for;

/// Address on which the agent listens for peers.
pub const ADDRESS: (Ipv6Addr, u16) = (Ipv6Addr::LOCALHOST, 47411);

/// Returns the UUID of a numbered domain.
pub const fn uuid(number: u8) -> [u8; 16] {
    [number; 16]
}

/// Returns the XML of a running domain with one NIC.
pub fn domain(name: &str, number: u8, tap: &str, mac: [u8; 6]) -> String {
    let hex: String = uuid(number)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mac: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "<domain type='test'><name>{name}</name><uuid>{hex}</uuid><memory>8192</memory>\
         <os><type>hvm</type></os><devices><interface type='bridge'><mac address='{}'/>\
         <source bridge='br0'/><target dev='{tap}'/></interface></devices></domain>",
        mac.join(":")
    )
}

/// Files of agent `vms1`: certificates, configuration, socket, log.
#[derive(Clone)]
pub struct Files {
    directory: Arc<TempDir>,
}

impl Files {
    /// Makes the files for an agent on bridge `br0` with pins below `bpffs`. `configuration` is
    /// appended to the necessary settings.
    pub fn new(bpffs: &Path, domains: &[String], configuration: &str) -> Self {
        let files = Self {
            directory: Arc::new(tempfile::tempdir().unwrap()),
        };
        pki::init(&files.pki(), "test CA", Validity::days(60)).unwrap();
        let TlsFiles {
            ca,
            certificate,
            key,
            ..
        } = issue(&files.pki(), "vms1", Role::Agent);
        let node = files.path("node.xml");
        fs::write(&node, format!("<node>{}</node>", domains.concat())).unwrap();
        let text = format!(
            "[agent]\nname = \"vms1\"\nbridge = \"br0\"\nlisten = \"[::1]:{}\"\n\
             control_socket = {:?}\npin_root = {:?}\n\
             [tls]\nca = {ca:?}\ncert = {certificate:?}\nkey = {key:?}\nadmit = [\"vms?\"]\n\
             [libvirt]\nuri = \"test://{}\"\n\
             [[peers]]\nname = \"vms2\"\naddress = \"[::1]:9\"\n{configuration}\n",
            ADDRESS.1,
            files.path("agent.sock"),
            bpffs.join("roamcast"),
            node.display(),
        );
        fs::write(files.path("roamcast.toml"), text).unwrap();
        files
    }

    /// Appends to the configuration.
    pub fn configure(&self, configuration: &str) {
        let path = self.path("roamcast.toml");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, text + configuration).unwrap();
    }

    /// Opens the log for [`Agent::start_with`].
    pub fn log_file(&self) -> Stdio {
        Stdio::from(fs::File::create(self.path("log")).unwrap())
    }

    /// Returns the directory in which the certificates are made.
    pub fn pki(&self) -> PathBuf {
        self.path("pki")
    }

    /// Returns the path of a file by its name.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts the agent in the namespaces of the calling thread.
    pub fn spawn(&self, stderr: Stdio) -> Agent {
        let command = Command::new(binaries::path("roamcast").unwrap());
        self.spawn_by(command, stderr)
    }

    /// Starts the agent with a command that runs `roamcast`.
    pub fn spawn_by(&self, mut command: Command, stderr: Stdio) -> Agent {
        let child = command
            .arg("agent")
            .arg("--config")
            .arg(self.path("roamcast.toml"))
            .stdin(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Agent {
            child,
            files: self.clone(),
        }
    }

    /// Returns the JSON of `roamcast status`, or `None` while the agent does not answer.
    pub fn status(&self) -> Option<Value> {
        self.query("status")
    }

    /// Returns the text of `roamcast status`.
    pub fn table(&self) -> String {
        let output = self.command(&["status"]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Returns one of the agent's tables as JSON.
    pub fn query(&self, table: &str) -> Option<Value> {
        let output = self.command(&[table, "--json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Returns a `roamcast` command that asks the agent, with a short timeout.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.arg("20").arg(binaries::path("roamcast").unwrap());
        command.args(arguments).arg("--socket");
        command.arg(self.path("agent.sock"));
        command
    }
}

/// A running agent, killed on drop.
pub struct Agent {
    /// The agent's process.
    pub child: Child,
    files: Files,
}

impl Agent {
    /// Starts an agent in the namespaces of the calling thread and waits until it has seen
    /// `domains`. `configuration` is appended to the necessary settings.
    pub fn start(bpffs: &Path, domains: &[String], configuration: &str) -> Self {
        let files = Files::new(bpffs, domains, configuration);
        let agent = files.spawn(files.log_file());
        wait_for("the agent", || {
            let log = agent.log();
            assert!(!log.starts_with("roamcast:"), "{log}");
            let status = agent.status()?;
            (status["hypervisor"]["state"] == "up").then_some(())
        });
        agent
    }

    /// Starts the agent with these files, with its log in `stderr`, and waits until it answers.
    pub fn start_with(files: &Files, stderr: Stdio) -> Self {
        let agent = files.spawn(stderr);
        wait_for("the agent", || files.status());
        agent
    }

    /// Connects as a peer with that name.
    pub fn peer(&self, name: &str) -> Liar {
        let files = issue(&self.files.pki(), name, Role::Agent);
        Liar::connect(SocketAddr::from(ADDRESS), "vms1", &files.ca, &files)
    }

    /// Returns a counter of the status.
    pub fn counter(&self, name: &str) -> u64 {
        let status = self.status().expect("a status");
        status["counters"][name].as_u64().unwrap_or_default()
    }

    /// Returns the peak memory of the process, KiB.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        number.unwrap().parse().unwrap()
    }

    /// Returns the content of the log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.files.path("log")).unwrap_or_default()
    }
}

/// Gives access to the methods of the agent's files.
impl Deref for Agent {
    type Target = Files;

    fn deref(&self) -> &Files {
        &self.files
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Issues certificates of the signalling.
pub fn issue(pki: &Path, name: &str, role: Role) -> TlsFiles {
    let request = IssueRequest {
        name: name.to_owned(),
        role,
        addresses: vec![Ipv6Addr::LOCALHOST.into()],
        validity: Validity::days(60),
    };
    TlsFiles::from(&pki::issue(pki, &request).unwrap().signalling)
}
