//! A mapping server (the real program) and its nodes.

use std::fs::DirBuilder;
use std::io;
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::mat::key::{KEY_BYTES, Key, Secret};
use common::mat::message::{
    LookupReply, LookupRequest, MatMessage, Moa, UpdateReply, UpdateRequest,
};
use common::mat::seal::{Keying, NONCE_BYTES, Sealed, seal};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Secret of all servers, from which the nodes' keys derive.
pub const SECRET: [u8; KEY_BYTES] = [0x5a; KEY_BYTES];
/// Home prefix, which has the HoA of every node.
pub const HOME: &str = "fd5e:6d61:74::/48";

/// Returns the HoA of a numbered node.
pub fn hoa(number: u32) -> Ipv6Addr {
    let [high, low] = [(number >> 16) as u16, number as u16];
    Ipv6Addr::new(0xfd5e, 0x6d61, 0x74, 0, 0, 1, high, low)
}

/// Returns the MoA of a node for a sequence number; each sequence number has another MoA.
pub fn moa(number: u32, sequence: u64) -> Ipv6Addr {
    let [high, low] = [(number >> 16) as u16, number as u16];
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 1, (sequence % 8) as u16, high, low)
}

/// Gives the calling thread private directories for the socket and pins of `migkick node`.
pub fn own_directories() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).unwrap();
    for (kind, place) in [("tmpfs", "/run"), ("bpf", "/sys/fs/bpf")] {
        mount(none, place, Some(kind), MsFlags::empty(), none).unwrap();
    }
    for directory in ["/run/migkick", "/sys/fs/bpf/migkick"] {
        DirBuilder::new().mode(0o700).create(directory).unwrap();
    }
}

/// Returns the path of the program `roamcast`.
pub fn roamcast() -> PathBuf {
    lab::binaries::path("roamcast").unwrap()
}

/// Writes a file that only its owner can read.
pub fn write_private(path: &Path, text: &str) {
    use std::io::Write as _;
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .unwrap();
}

/// Returns the content of a secret's file.
pub fn secret_text() -> String {
    SECRET.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Files of one server.
#[derive(Clone)]
pub struct Files {
    /// Place of all files.
    pub directory: PathBuf,
    /// UDP port at which the server listens.
    pub port: u16,
}

impl Files {
    /// Writes the configuration and the secret into a directory.
    pub fn new(directory: &Path, port: u16, more: &str) -> Self {
        std::fs::create_dir_all(directory).unwrap();
        let files = Self {
            directory: directory.to_owned(),
            port,
        };
        files.configure(more);
        write_private(&files.path("ims.secret"), &secret_text());
        files
    }

    /// Writes the configuration, with more lines at its end.
    pub fn configure(&self, more: &str) {
        let text = format!(
            "[ims]\nhome = \"{HOME}\"\nlisten = \"[::]:{}\"\nservers = [\"[::1]:{}\"]\n\
             control_socket = {:?}\nsecret = {:?}\nstore = {:?}\n{more}\n",
            self.port,
            self.port,
            self.path("ims.sock"),
            self.path("ims.secret"),
            self.path("store/ims.redb"),
        );
        std::fs::write(self.path("ims.toml"), text).unwrap();
    }

    /// Returns the path of a file by its name.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Returns a command of `roamcast ims` with these arguments and the configuration.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(roamcast());
        command.arg("ims").args(arguments);
        command.arg("--config").arg(self.path("ims.toml"));
        command
    }

    /// Runs `roamcast ims` with these arguments to completion.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Returns the JSON of `roamcast status`, or `None` while the server does not answer.
    pub fn status(&self) -> Option<serde_json::Value> {
        let output = Command::new(roamcast())
            .args(["status", "--json", "--socket"])
            .arg(self.path("ims.sock"))
            .stderr(Stdio::null())
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Returns the rows of `roamcast ims list --json`.
    pub fn list(&self) -> Vec<serde_json::Value> {
        let output = self.run(&["list", "--json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

/// A running server, killed on drop.
pub struct Server(pub Child);

impl Server {
    /// Starts the server in the namespaces of the calling thread.
    pub fn spawn(files: &Files) -> Self {
        Self(files.command(&[]).spawn().unwrap())
    }

    /// Kills the server as `kill -9` does.
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    /// Stops the server as systemd does. Returns the exit code.
    pub fn stop(mut self) -> Option<i32> {
        let pid = nix::unistd::Pid::from_raw(self.0.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.0.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A node with a socket connected to one server.
pub struct Node {
    /// Number from which the HoA follows.
    pub number: u32,
    /// Key of the node's present generation.
    pub key: Key,
    socket: UdpSocket,
    transaction: u64,
}

impl Node {
    /// Makes a node; call in a namespace that can reach the server.
    pub fn new(number: u32, generation: u32, port: u16) -> Self {
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        let server = SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0);
        socket.connect(server).unwrap();
        Self {
            number,
            key: Secret::new(&SECRET).node(hoa(number).octets(), generation),
            socket,
            transaction: u64::from(std::process::id()) << 32 | u64::from(number) << 20,
        }
    }

    /// Sends one request. Returns the socket's error if no answer arrives in time.
    pub fn ask(&mut self, message: &MatMessage, patience: Duration) -> io::Result<MatMessage> {
        self.transaction += 1;
        let transaction = self.transaction;
        let datagram = sealed(self.number, &self.key, transaction, message);
        self.socket.set_read_timeout(Some(patience))?;
        self.socket.send(&datagram)?;
        let mut buffer = [0; 2048];
        loop {
            let length = self.socket.recv(&mut buffer)?;
            let (answered, reply) = opened(&self.key, &buffer[..length]);
            if answered == transaction {
                return Ok(reply);
            }
        }
    }

    /// Registers the MoA of a sequence number. Returns the socket's error if no answer arrives in
    /// time.
    pub fn try_update(&mut self, sequence: u64, patience: Duration) -> io::Result<UpdateReply> {
        let request = update_request(self.number, sequence, 600);
        match self.ask(&request.into(), patience)? {
            MatMessage::UpdateReply(reply) => Ok(reply),
            other => panic!("{other:?}"),
        }
    }

    /// Registers the MoA of a sequence number; the server must answer.
    pub fn update(&mut self, sequence: u64) -> UpdateReply {
        self.try_update(sequence, Duration::from_secs(10)).unwrap()
    }

    /// Looks up the HoA of a numbered node; the server must answer.
    pub fn lookup(&mut self, wanted: u32) -> LookupReply {
        let wanted = hoa(wanted).octets().into();
        let request = LookupRequest { hoa: wanted };
        match self.ask(&request.into(), Duration::from_secs(10)).unwrap() {
            MatMessage::LookupReply(reply) => reply,
            other => panic!("{other:?}"),
        }
    }

    /// Returns true if the server answers this node at all.
    pub fn is_answered(&mut self) -> bool {
        let wanted = hoa(self.number).octets().into();
        let request = LookupRequest { hoa: wanted };
        self.ask(&request.into(), Duration::from_millis(500))
            .is_ok()
    }
}

/// Returns the wall clock's time, milliseconds since 1970.
pub fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_millis() as u64
}

/// Returns a request that registers the node's MoA of a sequence number.
pub fn update_request(number: u32, sequence: u64, lifetime_s: u32) -> UpdateRequest {
    UpdateRequest {
        sequence,
        time_ms: wall_ms(),
        lifetime_s,
        moas: vec![Moa {
            address: moa(number, sequence).octets().into(),
            priority: 1,
        }],
    }
}

/// Encrypts a message of a numbered node.
pub fn sealed(number: u32, key: &Key, transaction: u64, message: &MatMessage) -> Vec<u8> {
    let mut nonce = [0; NONCE_BYTES];
    nonce[..8].copy_from_slice(&transaction.to_be_bytes());
    let message = message.encode(transaction);
    seal(Keying::Node, hoa(number).octets(), key, nonce, &message)
}

/// Decrypts a datagram. Returns its transaction and message.
pub fn opened(key: &Key, datagram: &[u8]) -> (u64, MatMessage) {
    let message = Sealed::parse(datagram).unwrap().open(key).unwrap();
    MatMessage::decode(&message).unwrap()
}
