//! A relay between a network with multicast and an agent without it.
//!
//! ```text
//!   source namespace      relay namespace           agent namespace
//!   eth0 ------------- up0 roamcast relay out0 ------------- eth0
//!   2001:db8:9::2                    2001:db8:2::1   2001:db8:2::2
//! ```
//!
//! The relay is the real program. The test takes the agent's side of the signalling, over real
//! connections ([`Client`]).

use std::collections::BTreeMap;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use common::maps::FilterMode;
use common::signal::{PORT, PeerMessage, RelayRelease, RelayRequest, RelayResponse};
use roamcast::net::peers::{Endpoint, Peers, PeersConfig};
use roamcast::net::tls::{Tls, TlsFiles};
use roamcast::pki::{self, IssueRequest, Validity};
use roamcast::proto::PeerEvent;
use roamcast::role::Role;
use socket2::{Domain, Protocol, Socket, Type};
use tempfile::TempDir;

use super::netns::{DEADLINE, Namespace, command, wait_for};

/// Address of the sender.
pub const SOURCE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 9, 0, 0, 0, 0, 2);
/// Address of the relay on the agent's link.
pub const RELAY: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 1);
/// Address of the agent on the relay's link.
pub const AGENT: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 2);
/// UDP source port of the sender.
pub const SOURCE_PORT: u16 = 4000;
/// UDP destination port of the sender.
pub const DESTINATION_PORT: u16 = 5004;

/// The namespaces, and files for the programs in them.
pub struct Net {
    /// Namespace of the sender.
    pub source: Namespace,
    /// Namespace of the relay, between both links.
    pub relay: Namespace,
    /// Namespace of the agent.
    pub agent: Namespace,
    directory: TempDir,
}

impl Net {
    /// Makes the namespaces with their links, and a certification authority.
    pub fn new() -> Self {
        let (source, relay, agent) = (
            Namespace::new("source"),
            Namespace::new("relay"),
            Namespace::new("agent"),
        );
        for (port, peer, address, own) in [
            ("up0", &source, "2001:db8:9::2/64", "2001:db8:9::1/64"),
            ("out0", &agent, "2001:db8:2::2/64", "2001:db8:2::1/64"),
        ] {
            relay.ip(&format!(
                "link add {port} type veth peer name eth0 netns {}",
                peer.name()
            ));
            relay.ip(&format!("link set {port} up"));
            peer.ip("link set eth0 up");
            relay.ip(&format!("addr add {own} dev {port} nodad"));
            peer.ip(&format!("addr add {address} dev eth0 nodad"));
        }
        // Complete checksums, as on a wire, let the receiver verify them.
        source.run(|| command("ethtool", &["-K", "eth0", "tx", "off"]));
        let directory = tempfile::tempdir().unwrap();
        pki::init(directory.path(), "test CA", Validity::days(1)).unwrap();
        Self {
            source,
            relay,
            agent,
            directory,
        }
    }

    /// Returns the path of a file by its name.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns the path of the relay's control socket.
    pub fn socket(&self) -> PathBuf {
        self.path("relay.sock")
    }

    fn certificate(&self, name: &str, role: Role, address: Ipv6Addr) -> TlsFiles {
        let request = IssueRequest {
            name: name.to_owned(),
            role,
            addresses: vec![address.into()],
            validity: Validity::days(1),
        };
        let issued = pki::issue(self.directory.path(), &request).unwrap();
        TlsFiles::from(&issued.signalling)
    }

    /// Writes the relay's configuration and returns its path.
    pub fn configure(&self, bpffs: &Path, limits: &str) -> PathBuf {
        let files = self.certificate("relay1", Role::Relay, RELAY);
        // The lease outlasts a restart on a slow machine, but not the tests' timeouts.
        let lease_s = lab::wait::patience(Duration::from_secs(10)).as_secs();
        let text = format!(
            "[relay]\nname = \"relay1\"\ninterfaces = [\"up0\"]\naddress = \"{RELAY}\"\n\
             control_socket = {:?}\npin_root = {:?}\nlease_s = {lease_s}\n\
             [tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n\
             [[policy]]\nagents = [\"vms*\"]\nmulticast_addresses = [\"ff00::/8\"]\n\
             agent_addresses = [\"2001:db8:2::77/128\", \"2001:db8:77::/64\"]\n\
             [limits]\n{limits}\n[log]\nlevel = \"info\"\n",
            self.socket(),
            bpffs.join("relay"),
            files.ca,
            files.certificate,
            files.key,
        );
        let path = self.path("relay.toml");
        std::fs::write(&path, text).unwrap();
        path
    }

    /// Returns the JSON of the relay's `roamcast status`.
    pub fn status(&self) -> serde_json::Value {
        let program = lab::binaries::path("roamcast").unwrap();
        let socket = self.socket();
        let arguments = ["status", "--json", "--socket", socket.to_str().unwrap()];
        let text = command(program.to_str().unwrap(), &arguments);
        serde_json::from_str(&text).unwrap()
    }

    /// Returns true if the relay's kernel keeps the agent's link address resolved.
    pub fn is_neighbour_kept(&self) -> bool {
        let agent = AGENT.to_string();
        self.relay
            .run(|| command("ip", &["neigh", "show", "dev", "out0"]))
            .lines()
            .any(|line| line.starts_with(&agent) && line.contains("managed"))
    }

    /// Returns true if the relay's interface is a member of an address, whoever joined.
    pub fn is_joined(&self, address: Ipv6Addr) -> bool {
        let hex: String = address
            .octets()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        self.relay
            .run(|| std::fs::read_to_string("/proc/thread-self/net/igmp6").unwrap())
            .lines()
            .any(|line| line.contains("up0") && line.contains(&hex))
    }
}

/// The relay's process; killed on drop.
pub struct Relay(Child);

impl Relay {
    /// Starts the relay in the namespaces of the calling thread, and waits until it serves.
    pub fn start(net: &Net, config: &Path) -> Self {
        let program = lab::binaries::path("roamcast").unwrap();
        let mut command = Command::new(program);
        command.arg("relay").arg("--config").arg(config);
        Self::run(net, command)
    }

    /// Starts the relay with a command that runs it, and waits until it serves.
    pub fn run(net: &Net, mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        wait_for("the relay's socket", || {
            assert!(child.try_wait().unwrap().is_none(), "the relay has ended");
            std::os::unix::net::UnixStream::connect(net.socket()).ok()
        });
        Self(child)
    }

    /// Kills the relay as `kill -9` does.
    pub fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

enum Order {
    Connect,
    Send(Vec<u8>),
}

/// An agent's side of the signalling.
pub struct Client {
    orders: tokio::sync::mpsc::UnboundedSender<Order>,
    events: Receiver<PeerEvent>,
}

impl Client {
    /// Starts an agent with that name in the agent's namespace; it ends on drop.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        net: &'scope Net,
        name: &'scope str,
    ) -> Self {
        let (orders, mut inbox) = tokio::sync::mpsc::unbounded_channel();
        let (outbox, events) = channel();
        let files = net.certificate(name, Role::Agent, AGENT);
        scope.spawn(move || {
            net.agent.run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(async {
                    let (sender, mut events) = tokio::sync::mpsc::channel(16);
                    let relay = Endpoint {
                        role: Role::Relay,
                        address: format!("[{RELAY}]:{PORT}"),
                    };
                    let config = PeersConfig {
                        name: name.to_owned(),
                        listen: SocketAddrV6::new(Ipv6Addr::LOCALHOST, 0, 0, 0).into(),
                        peers: BTreeMap::from([("relay1".to_owned(), relay)]),
                        ..PeersConfig::default()
                    };
                    let tls = Tls::load(&files, name, Role::Agent).unwrap();
                    let peers = Peers::start(config, tls, sender).unwrap();
                    loop {
                        tokio::select! {
                            order = inbox.recv() => match order {
                                Some(Order::Connect) => peers.connect("relay1"),
                                Some(Order::Send(bytes)) => peers.send("relay1", bytes),
                                None => return,
                            },
                            Some(from) = events.recv() => {
                                let _ = outbox.send(from.event);
                            }
                        }
                    }
                });
            });
        });
        Self { orders, events }
    }

    /// Connects, with as many attempts as necessary.
    pub fn connect(&self) {
        wait_for("a connection to the relay", || {
            self.orders.send(Order::Connect).unwrap();
            loop {
                match self
                    .events
                    .recv_timeout(lab::wait::patience(DEADLINE))
                    .unwrap()
                {
                    PeerEvent::Up { .. } => return Some(()),
                    PeerEvent::Down { .. } => return None,
                    PeerEvent::Frame(_) => {}
                }
            }
        });
    }

    /// Sends a message to the relay.
    pub fn send(&self, transaction: u64, message: impl Into<PeerMessage>) {
        let bytes = message.into().encode(transaction);
        self.orders.send(Order::Send(bytes)).unwrap();
    }

    /// Waits for the next message of a transaction.
    pub fn message(&self, transaction: u64) -> PeerMessage {
        loop {
            if let PeerEvent::Frame(bytes) = self
                .events
                .recv_timeout(lab::wait::patience(DEADLINE))
                .unwrap()
            {
                let (number, message) = PeerMessage::decode(&bytes).unwrap();
                if number == transaction {
                    return message;
                }
            }
        }
    }

    /// Waits for the response of a transaction, which must not be refused.
    pub fn response(&self, transaction: u64) -> RelayResponse {
        match self.message(transaction) {
            PeerMessage::RelayResponse(response) => response,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for the reason with which the relay refuses a transaction.
    pub fn refusal(&self, transaction: u64) -> String {
        match self.message(transaction) {
            PeerMessage::RelayRelease(RelayRelease(reason)) => reason.text,
            other => panic!("{other:?}"),
        }
    }
}

/// Returns a request for any source, or for the given ones.
pub fn request(address: Ipv6Addr, sources: &[Ipv6Addr]) -> RelayRequest {
    let filter_mode = if sources.is_empty() {
        FilterMode::Exclude
    } else {
        FilterMode::Include
    };
    RelayRequest {
        multicast_address: address.octets().into(),
        filter_mode: filter_mode as u8,
        sources: sources.iter().map(|it| it.octets().into()).collect(),
        agent_address: AGENT.octets().into(),
        flows: Vec::new(),
    }
}

/// Payload of a test datagram, bytes: 20 Mbit/s with one datagram per [`INTERVAL`].
const DATAGRAM_BYTES: usize = 1450;
const INTERVAL: Duration = Duration::from_micros(580);

/// A stream of numbered datagrams.
pub struct Sender<'scope> {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU32>,
    thread: Option<ScopedJoinHandle<'scope, ()>>,
}

impl<'scope> Sender<'scope> {
    /// Starts a stream at 20 Mbit/s.
    pub fn start(
        scope: &'scope Scope<'scope, '_>,
        net: &'scope Net,
        address: Ipv6Addr,
        source_port: u16,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU32::new(0));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&sent));
        let ifindex = net.source.ifindex("eth0");
        let thread = scope.spawn(move || {
            net.source.run(|| {
                let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).unwrap();
                let own = SocketAddrV6::new(SOURCE, source_port, 0, 0);
                socket.bind(&own.into()).unwrap();
                socket.set_multicast_if_v6(ifindex).unwrap();
                socket.set_multicast_hops_v6(8).unwrap();
                let to = SocketAddrV6::new(address, DESTINATION_PORT, 0, 0).into();
                let mut datagram = [0; DATAGRAM_BYTES];
                while !stopped.load(Ordering::Relaxed) {
                    let number = counter.fetch_add(1, Ordering::Relaxed);
                    datagram[..4].copy_from_slice(&number.to_be_bytes());
                    socket.send_to(&datagram, &to).unwrap();
                    // Paces the stream.
                    std::thread::sleep(INTERVAL);
                }
            });
        });
        Self {
            stop,
            sent,
            thread: Some(thread),
        }
    }

    /// Stops the stream. Returns the number of datagrams sent.
    pub fn stop(mut self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.sent.load(Ordering::Relaxed)
    }
}

impl Drop for Sender<'_> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Datagrams to one port of the agent, received on a socket; the kernel drops those with a wrong
/// checksum.
pub struct Received {
    numbers: Arc<Mutex<Vec<u32>>>,
    stop: Arc<AtomicBool>,
}

impl Received {
    /// Receives at one port of the agent from one port of the relay.
    pub fn start<'scope>(
        scope: &'scope Scope<'scope, '_>,
        net: &'scope Net,
        relay_port: u16,
        agent_port: u16,
    ) -> Self {
        let numbers = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (log, stopped) = (Arc::clone(&numbers), Arc::clone(&stop));
        let socket = net.agent.run(|| {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP)).unwrap();
            socket.set_recv_buffer_size(8 << 20).unwrap();
            let own = SocketAddrV6::new(AGENT, agent_port, 0, 0);
            socket.bind(&own.into()).unwrap();
            let from = SocketAddrV6::new(RELAY, relay_port, 0, 0);
            socket.connect(&from.into()).unwrap();
            socket
                .set_read_timeout(Some(Duration::from_millis(50)))
                .unwrap();
            std::net::UdpSocket::from(socket)
        });
        scope.spawn(move || {
            let mut datagram = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok(length) = socket.recv(&mut datagram) {
                    assert_eq!(length, DATAGRAM_BYTES);
                    let number = u32::from_be_bytes(datagram[..4].try_into().unwrap());
                    log.lock().unwrap().push(number);
                }
            }
        });
        Self { numbers, stop }
    }

    /// Returns the numbers of all datagrams so far.
    pub fn numbers(&self) -> Vec<u32> {
        self.numbers.lock().unwrap().clone()
    }

    /// Waits for this many more datagrams.
    pub fn more(&self, count: usize) {
        let before = self.numbers().len();
        wait_for("more datagrams", || {
            (self.numbers().len() >= before + count).then_some(())
        });
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
