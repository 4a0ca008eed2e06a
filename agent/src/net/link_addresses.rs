//! Unicast addresses of moving VMs on the bridge's link: Neighbor Discovery (RFC 4861) on their
//! behalf.
//!
//! ```text
//!   network -- uplink --+-- br0 (this host) <--- Solicitations and Advertisements to groups, of all
//!                 ^     |
//!                 |     +-- TAP <--- frames of an arrived VM: it speaks for itself
//!                 '--- Solicitations to a VM that has left
//! ```
//!
//! The host joins the solicited-node group of each address through a kernel socket on the bridge,
//! so that switches with MLD snooping forward the Solicitations. [`crate::proto`] decides what to
//! answer.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv6Addr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use common::wire::neighbour::{self, Audience, Kind};
use linux::packet_socket::PacketSocket;
use linux::random;
use nix::ifaddrs::getifaddrs;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::fdb::{Entry as FdbEntry, Fdb};
use super::frame_filter::{self, Wanted};
use crate::proto::{AddressCommand, AddressEvent, Mac, Said};

/// Capacity of the event queue. A neighbour repeats a message that found the queue full.
const EVENTS: usize = 256;
/// Longest Solicitation or Advertisement read, bytes.
const FRAME_BYTES: usize = 512;
/// Pause after an error of a socket.
const PAUSE: Duration = Duration::from_millis(100);

/// Why the addresses cannot be watched.
#[derive(Debug, thiserror::Error)]
#[error("Cannot ask the kernel for {what}: {error}; run the agent as root")]
pub struct LinkAddressesError {
    what: &'static str,
    #[source]
    error: io::Error,
}

/// The watched addresses. Dropping the value ends everything except the forwarding entries of the
/// bridge.
pub struct LinkAddresses {
    bridge: String,
    ifindex: u32,
    /// Receives frames to groups; `None` while there is no address to watch.
    listener: Option<(Arc<AsyncFd<PacketSocket>>, Task)>,
    watched: Arc<Mutex<BTreeSet<Ipv6Addr>>>,
    addresses: BTreeMap<Ipv6Addr, Watched>,
    uplinks: BTreeSet<u32>,
    uplink_listeners: BTreeMap<u32, Task>,
    fdb: Fdb,
    sender: mpsc::Sender<AddressEvent>,
    events: mpsc::Receiver<AddressEvent>,
}

/// State of one address.
#[derive(Default)]
struct Watched {
    /// Socket that holds the membership of the solicited-node group.
    _membership: Option<Socket>,
    expected: Option<(u32, Mac)>,
    tap: Option<Task>,
    replaced: bool,
}

/// A task that ends when its owner is dropped.
struct Task(JoinHandle<()>);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl LinkAddresses {
    /// Opens the bridge's forwarding database in the network namespace of the calling thread, with
    /// no address.
    ///
    /// # Errors
    ///
    /// [`LinkAddressesError`].
    pub fn open(bridge: &str, ifindex: u32) -> Result<Self, LinkAddressesError> {
        let failed = |what| move |error| LinkAddressesError { what, error };
        let (sender, events) = mpsc::channel(EVENTS);
        Ok(Self {
            bridge: bridge.to_owned(),
            ifindex,
            listener: None,
            watched: Arc::default(),
            addresses: BTreeMap::new(),
            uplinks: BTreeSet::new(),
            uplink_listeners: BTreeMap::new(),
            fdb: Fdb::open().map_err(failed("the bridge's forwarding database"))?,
            sender,
            events,
        })
    }

    /// Waits for the next event. Cancel safe.
    pub async fn next(&mut self) -> Option<AddressEvent> {
        self.events.recv().await
    }

    /// Carries out a command of the protocol. Failures are only logged: they delay no migration.
    pub fn perform(&mut self, command: &AddressCommand) {
        let done = match *command {
            AddressCommand::Watch { address } => self.watch(address),
            AddressCommand::Probe { address } => self.probe(address),
            AddressCommand::Advertise {
                address,
                owner,
                overrides,
                to,
            } => self.advertise(address, owner, overrides, to),
            AddressCommand::Expect {
                address,
                mac,
                ifindex,
            } => self.expect(address, mac, ifindex),
            AddressCommand::Replace { address } => {
                self.addresses.entry(address).or_default().replaced = true;
                self.listen_to_uplinks();
                Ok(())
            }
            AddressCommand::Forget { address, spoken } => {
                self.forget(address, spoken);
                Ok(())
            }
        };
        if let Err(error) = done {
            tracing::warn!(?command, %error, "An address of a moving VM cannot be cared for");
        }
    }

    /// Sends unsolicited Advertisements of the host's own addresses to the link, because neighbours
    /// may know these addresses by an earlier MAC of the bridge (RFC 4861 §7.2.6). Does nothing
    /// while no address is watched, because nobody needs the host's addresses then.
    pub fn announce(&self) {
        if self.listener.is_none() {
            return;
        }
        let host = match self.host() {
            Ok(host) => host,
            Err(error) => {
                tracing::warn!(%error, "The addresses of this host are not known");
                return;
            }
        };
        for address in host.on_link {
            if let Err(error) = self.advertise(address, None, true, None) {
                tracing::warn!(%address, %error, "An address of this host is not told anew");
            }
        }
    }

    /// Registers an uplink that joined the bridge.
    pub fn uplink_added(&mut self, ifindex: u32) {
        self.uplinks.insert(ifindex);
        self.listen_to_uplinks();
    }

    /// Removes an uplink that left the bridge.
    pub fn uplink_removed(&mut self, ifindex: u32) {
        self.uplinks.remove(&ifindex);
        self.uplink_listeners.remove(&ifindex);
    }

    fn watch(&mut self, address: Ipv6Addr) -> io::Result<()> {
        if self.host()?.addresses.contains(&address) {
            self.tell(AddressEvent::Own { address });
            return Ok(());
        }
        if self.listener.is_none() {
            let socket = frame_filter::open(self.ifindex, Wanted::Neighbours)?;
            let socket = Arc::new(socket.watch()?);
            let task = self.hear(Arc::clone(&socket));
            self.listener = Some((socket, task));
        }
        lock(&self.watched).insert(address);
        let membership = self.join(address)?;
        self.addresses.entry(address).or_default()._membership = Some(membership);
        Ok(())
    }

    fn join(&self, address: Ipv6Addr) -> io::Result<Socket> {
        let group = neighbour::solicited_node(&address.octets());
        let socket = Socket::new(Domain::IPV6, Type::DGRAM.cloexec(), Some(Protocol::UDP))?;
        socket.join_multicast_v6(&Ipv6Addr::from(group), self.ifindex)?;
        Ok(socket)
    }

    /// Starts a task that turns the frames of a socket into events.
    fn hear(&self, socket: Arc<AsyncFd<PacketSocket>>) -> Task {
        let (watched, sender) = (Arc::clone(&self.watched), self.sender.clone());
        let own_mac = self.host().map(|host| host.mac).unwrap_or_default();
        Task(tokio::spawn(async move {
            let mut buffer = [0; FRAME_BYTES];
            loop {
                let length = receive(&socket, &mut buffer).await;
                let event = buffer
                    .get(..length)
                    .and_then(neighbour::parse)
                    // Skips the host's own frames, which a loop in the network returns.
                    .filter(|message| message.source_mac != own_mac)
                    .map(|message| heard(&message))
                    .filter(|(address, ..)| lock(&watched).contains(address));
                if let Some((address, said, by)) = event {
                    // A full queue loses nothing for good: the neighbour repeats its message.
                    let _ = sender.try_send(AddressEvent::Heard { address, said, by });
                }
            }
        }))
    }

    fn probe(&self, address: Ipv6Addr) -> io::Result<()> {
        // A random nonce, unique to this node (RFC 7527 §4.1).
        let frame = neighbour::probe(&address.octets(), self.host()?.mac, random::bytes()?);
        self.send(&frame)
    }

    fn advertise(
        &self,
        address: Ipv6Addr,
        owner: Option<Mac>,
        overrides: bool,
        to: Option<(Ipv6Addr, Mac)>,
    ) -> io::Result<()> {
        let host = self.host()?;
        let audience = to.map_or(Audience::Everybody, |(asker, mac)| {
            Audience::Asker(asker.octets(), mac)
        });
        // The host's link-local address, or the target address if the host has none.
        let source = host.link_local.unwrap_or(address);
        let frame = neighbour::advertisement(
            &address.octets(),
            owner.unwrap_or(host.mac),
            overrides,
            &source.octets(),
            host.mac,
            audience,
        );
        self.send(&frame)
    }

    fn send(&self, frame: &[u8]) -> io::Result<()> {
        let Some((socket, _)) = &self.listener else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        socket.get_ref().send(frame).map(drop)
    }

    fn expect(&mut self, address: Ipv6Addr, mac: Mac, ifindex: u32) -> io::Result<()> {
        if let Err(refusal) = self.fdb.set(ifindex, mac, FdbEntry::Static) {
            tracing::debug!(ifindex, %refusal, "Frames for an arriving VM are flooded until it speaks");
        }
        let socket = frame_filter::open(ifindex, Wanted::From(address))?;
        let socket = socket.watch()?;
        let sender = self.sender.clone();
        let task = Task(tokio::spawn(async move {
            receive(&socket, &mut [0; 1]).await;
            let _ = sender.send(AddressEvent::Spoke { address }).await;
        }));
        let watched = self.addresses.entry(address).or_default();
        watched.expected = Some((ifindex, mac));
        watched.tap = Some(task);
        Ok(())
    }

    fn forget(&mut self, address: Ipv6Addr, spoken: bool) {
        lock(&self.watched).remove(&address);
        let Some(watched) = self.addresses.remove(&address) else {
            return;
        };
        if let Some((ifindex, mac)) = watched.expected {
            let done = if spoken {
                self.fdb.set(ifindex, mac, FdbEntry::Learnt)
            } else {
                self.fdb.remove(ifindex, mac)
            };
            if let Err(refusal) = done {
                // Fails if the TAP, and its entry, no longer exist.
                tracing::debug!(ifindex, %refusal, "Entry of a VM's MAC is left as it is");
            }
        }
        if self.addresses.is_empty() {
            self.listener = None;
        }
        self.listen_to_uplinks();
    }

    /// Listens on the uplinks while neighbours may solicit a VM that has left; otherwise closes the
    /// sockets.
    fn listen_to_uplinks(&mut self) {
        if !self.addresses.values().any(|watched| watched.replaced) {
            self.uplink_listeners.clear();
            return;
        }
        for ifindex in self.uplinks.clone() {
            if self.uplink_listeners.contains_key(&ifindex) {
                continue;
            }
            let socket = frame_filter::open(ifindex, Wanted::UnicastSolicitations)
                .and_then(PacketSocket::watch);
            match socket {
                Ok(socket) => {
                    let task = self.hear(Arc::new(socket));
                    self.uplink_listeners.insert(ifindex, task);
                }
                Err(error) => tracing::warn!(
                    ifindex,
                    %error,
                    "Neighbours that ask a VM that has left are not heard"
                ),
            }
        }
    }

    fn tell(&self, event: AddressEvent) {
        let _ = self.sender.try_send(event);
    }

    /// Reads the addresses and the MAC of the host. They are read each time because a bridge
    /// changes its MAC with its ports.
    fn host(&self) -> io::Result<Host> {
        let mut host = Host::default();
        for interface in getifaddrs()? {
            let Some(address) = interface.address else {
                continue;
            };
            let is_bridge = interface.interface_name == self.bridge;
            if let Some(inet6) = address.as_sockaddr_in6() {
                host.addresses.insert(inet6.ip());
                if is_bridge {
                    host.on_link.push(inet6.ip());
                }
                if is_bridge && inet6.ip().is_unicast_link_local() {
                    host.link_local = Some(inet6.ip());
                }
            } else if is_bridge
                && let Some(mac) = address
                    .as_link_addr()
                    .and_then(nix::sys::socket::LinkAddr::addr)
            {
                host.mac = mac;
            }
        }
        Ok(host)
    }
}

/// Waits for a frame without limit. A link that is down, or not up yet, reports an error; frames
/// may follow once the link is up.
async fn receive(socket: &AsyncFd<PacketSocket>, buffer: &mut [u8]) -> usize {
    loop {
        let received = socket
            .async_io(Interest::READABLE, |it| it.receive(buffer))
            .await;
        match received {
            Ok(length) => return length,
            Err(error) => tracing::debug!(%error, "Nothing is heard for now"),
        }
        sleep(PAUSE).await;
    }
}

/// Addresses of this host.
#[derive(Default)]
struct Host {
    mac: Mac,
    link_local: Option<Ipv6Addr>,
    /// Addresses of the bridge.
    on_link: Vec<Ipv6Addr>,
    /// Addresses of all interfaces.
    addresses: BTreeSet<Ipv6Addr>,
}

fn heard(message: &neighbour::Message) -> (Ipv6Addr, Said, Mac) {
    let target = Ipv6Addr::from(message.target);
    match message.kind {
        Kind::Advertisement { .. } => (target, Said::Has, message.claimant()),
        Kind::Solicitation if message.is_probe() => (target, Said::Wants, message.claimant()),
        Kind::Solicitation => (
            target,
            Said::Asks(message.source.into()),
            message.link_address.unwrap_or(message.source_mac),
        ),
    }
}

/// Locks the set. A holder that panicked leaves a valid set, so poisoning is ignored.
fn lock(watched: &Mutex<BTreeSet<Ipv6Addr>>) -> std::sync::MutexGuard<'_, BTreeSet<Ipv6Addr>> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}
