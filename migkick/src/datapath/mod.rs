//! The data path of a node: `mat0`, the kernel programs and their maps. Nothing outside this module
//! knows of aya.
//!
//! ```text
//!  mat0 --TC egress---> mat_out --> active NIC, multicast NIC
//!                        ^ NODE, PEERS          '--> HELD --> daemon --> mat0 again
//!  NIC  --TC ingress--> mat_in ---> mat0
//!                        ^ NODE, PEER_MOAS, OWN_MOAS
//! ```
//!
//! Maps and links are pinned (`pins`): without a daemon the programs go on, and the next one of the
//! same HoA adopts them, with the peers. Only [`Datapath::detach`] takes them away.
//!
//! The kernel looks the next hop up for every packet, among the routes of the active NIC (`routes`).
//!
//! What mobility costs: between two nodes that know each other everything is mobile. A packet from
//! a peer's MoA reaches the HoA, so a connection between the MoAs themselves is not possible, apart
//! from the daemons' and the IMS's ports.
//!
//! # Minimum kernel version
//!
//! 6.6, for TCX.

mod device;
mod held;
pub mod object;
mod pins;
mod query;
mod routes;
mod tables;

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;

use aya::Ebpf;
use common::mat::counter::Counter;
use common::mat::maps::{Held, Node};
use common::mat::neutral::difference;
use common::mat::translate::{address, mac, words};
use linux::bpf::link::chain;
use linux::bpf::pins::PinError;
use linux::bpf::record;
use linux::packet_socket::PacketSocket;
use netlink_packet_route::route::RouteMessage;

use crate::interface::MAT_DEVICE;
use device::Device;
pub use held::HeldFrame;
pub use linux::bpf::has_tcx;
use linux::interface::Interface;
use pins::{Pins, Program};
use tables::Tables;
pub use tables::Usage;

/// Why the data path does not work.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The kernel has no TCX.
    #[error(
        "This kernel has no TCX (Linux 6.6), which nodes need; moves and streams work without a node"
    )]
    NoTcx,
    /// Another daemon holds the pins.
    #[error("Another `migkick node` runs here; stop it first")]
    InUse,
    /// `mat0` is something else.
    #[error("Interface mat0 is none of migkick's; rename it")]
    DeviceTaken,
    /// The home prefix is longer than an address, or the HoA is not in it.
    #[error("{hoa} is not in the home prefix {prefix}/{length}; correct the key file")]
    NotHome {
        /// The HoA.
        hoa: Ipv6Addr,
        /// The prefix.
        prefix: Ipv6Addr,
        /// Its length, bits.
        length: u8,
    },
    /// `mat0` or a NIC could not be set up.
    #[error("Cannot {step} for mat0; run migkick as root")]
    Device {
        /// What was tried.
        step: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A pin could not be made, read or removed.
    #[error("Cannot use {}; run migkick as root", path.display())]
    Pin {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the programs or maps.
    #[error(
        "Cannot load the kernel programs: {0}; migkick needs root or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
    )]
    Load(String),
    /// A map or program is not as expected.
    #[error("Map or program {name} is not of this version's layout; remove /sys/fs/bpf/migkick")]
    Layout {
        /// Its name.
        name: &'static str,
    },
    /// A map operation failed.
    #[error("Map {name}: {reason}")]
    Map {
        /// The map.
        name: &'static str,
        /// What the kernel said.
        reason: String,
    },
    /// A program could not be attached.
    #[error("Cannot attach {program} to {interface}: {reason}")]
    Attach {
        /// The program.
        program: &'static str,
        /// Name of the interface.
        interface: String,
        /// What the kernel said.
        reason: String,
    },
}

impl From<PinError> for DatapathError {
    fn from(error: PinError) -> Self {
        match error {
            PinError::InUse(_) => Self::InUse,
            PinError::Pin { path, error } => Self::Pin {
                path,
                source: error,
            },
        }
    }
}

/// See the [module documentation](self).
pub struct Datapath {
    pins: Pins,
    programs: Ebpf,
    tables: Tables,
    device: Device,
    /// Sends out by `mat0`.
    socket: PacketSocket,
    nics: Vec<Interface>,
    node: Node,
    /// Routes of the network that a NIC is going to be in.
    planned: Vec<RouteMessage>,
    /// Whether the multicast NIC takes all multicast because of this data path.
    all_multicast: bool,
}

impl Datapath {
    /// Makes `mat0` with the HoA and the route of the home prefix, loads the programs and attaches
    /// them to `mat0` and the NICs, or adopts what an earlier daemon of the same HoA has left,
    /// peers included. The first of the NICs becomes the multicast NIC unless one of them is
    /// already; none becomes active.
    ///
    /// # Errors
    ///
    /// See [`DatapathError`].
    pub fn attach(
        hoa: Ipv6Addr,
        home: (Ipv6Addr, u8),
        nics: &[Interface],
    ) -> Result<Self, DatapathError> {
        if !has_tcx() {
            return Err(DatapathError::NoTcx);
        }
        let mask = mask(hoa, home)?;
        let pins = Pins::open()?;
        let mut programs = pins.load()?;
        let mut tables = Tables::take(&mut programs)?;
        let mut node = tables.node()?;
        let adopt = node.hoa == words(hoa.octets());
        if !adopt {
            drop((programs, tables));
            pins.clear()?;
            programs = pins.load()?;
            tables = Tables::take(&mut programs)?;
            node = Node::default();
        }
        let mut device = Device::make(hoa, home, adopt)?;
        device.fit(nics)?;
        node.hoa = words(hoa.octets());
        node.home = words((home.0 & mask).octets());
        node.home_mask = words(mask.octets());
        node.mat0_ifindex = device.ifindex;
        node.mat0_mac = mac(device.mac);
        let has = |ifindex: u32| nics.iter().any(|it| it.ifindex == ifindex);
        if !has(node.ifindex) {
            node.ifindex = 0;
        }
        let multicast = nics
            .iter()
            .find(|it| it.ifindex == node.multicast_ifindex)
            .or_else(|| nics.first());
        let mut datapath = Self {
            // An earlier daemon has switched it on.
            all_multicast: adopt && has(node.multicast_ifindex),
            socket: PacketSocket::sending(device.ifindex).map_err(|source| {
                DatapathError::Device {
                    step: "open a packet socket",
                    source,
                }
            })?,
            pins,
            programs,
            tables,
            device,
            nics: Vec::new(),
            node,
            planned: Vec::new(),
        };
        datapath.publish()?;
        datapath.pins.attach(
            &mut datapath.programs,
            Program::Out,
            datapath.device.ifindex,
            MAT_DEVICE,
        )?;
        for nic in nics {
            datapath.add_nic(nic)?;
        }
        if let Some(nic) = multicast {
            datapath.set_multicast_nic(nic)?;
        }
        Ok(datapath)
    }

    /// Accepts packets on one more NIC.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`].
    pub fn add_nic(&mut self, nic: &Interface) -> Result<(), DatapathError> {
        self.pins
            .attach(&mut self.programs, Program::In, nic.ifindex, &nic.name)?;
        self.nics.retain(|it| it.ifindex != nic.ifindex);
        self.nics.push(nic.clone());
        self.device.fit(&self.nics)?;
        self.follow_routes()
    }

    /// Takes the routes of the NICs as they are now. To be called when one has changed.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Device`].
    pub fn follow_routes(&mut self) -> Result<(), DatapathError> {
        self.device.follow_routes(&self.nics, &self.planned)
    }

    /// Forgets a NIC that is gone.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Device`].
    pub fn remove_nic(&mut self, ifindex: u32) -> Result<(), DatapathError> {
        if let Some(at) = self.nics.iter().position(|it| it.ifindex == ifindex) {
            let nic = self.nics.remove(at);
            self.device.forget_routes(&nic)?;
        }
        self.pins.detach(Program::In, ifindex)
    }

    /// Sends by this NIC, from this MoA, from the next packet on.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`], [`DatapathError::Device`].
    pub fn set_active(&mut self, nic: &Interface, moa: Ipv6Addr) -> Result<(), DatapathError> {
        let is_planned = self.planned.iter().any(|it| routes::leaves_by(it, nic));
        if !is_planned {
            self.follow_routes()?;
        }
        self.node.ifindex = nic.ifindex;
        self.node.moa = words(moa.octets());
        let hoa = address(self.node.hoa);
        self.node.difference = difference(hoa, moa.octets());
        self.node.difference_back = difference(moa.octets(), hoa);
        self.publish()
    }

    /// Lets what will leave by this NIC, once it is active, take the routes of a network: one of its
    /// addresses with the prefix length, and the router if it is known. They lead nobody else there, so
    /// they may be set before the NIC is in that network, and the switch is one map update then.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Device`].
    pub fn plan_routes(
        &mut self,
        nic: &Interface,
        network: (Ipv6Addr, u8),
        router: Option<Ipv6Addr>,
    ) -> Result<(), DatapathError> {
        self.planned = routes::of_network(nic, network, router);
        self.follow_routes()
    }

    /// There is no such plan any more: the routes are in the main table, or nobody needs them.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Device`].
    pub fn forget_plan(&mut self) -> Result<(), DatapathError> {
        self.planned.clear();
        self.follow_routes()
    }

    /// Lets the multicast of `mat0` come and go by this NIC, with the link-local address that it has
    /// now. While it has none MLD of `mat0` is not sent, so this is to be called again when it has.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Device`], [`DatapathError::Map`].
    pub fn set_multicast_nic(&mut self, nic: &Interface) -> Result<(), DatapathError> {
        let before = self.node.multicast_ifindex;
        if before != nic.ifindex && std::mem::take(&mut self.all_multicast) {
            self.device.all_multicast(before, false)?;
        }
        self.all_multicast |= self.device.all_multicast(nic.ifindex, true)?;
        let source = self.device.link_local(nic.ifindex)?;
        self.node.multicast_ifindex = nic.ifindex;
        self.node.multicast_mac = mac(nic.mac);
        self.node.multicast_source = words(source.unwrap_or(Ipv6Addr::UNSPECIFIED).octets());
        self.publish()
    }

    /// Accepts packets to these MoAs, and to the active one, and to no others.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn set_own(&mut self, moas: &[Ipv6Addr]) -> Result<(), DatapathError> {
        self.tables.set_own(address(self.node.hoa), moas)
    }

    /// Sends what is for a peer to `to`, and accepts what comes from `from` as the peer's, `to` to be
    /// among them. Whatever else was accepted of it is not any more.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn set_peer(
        &mut self,
        hoa: Ipv6Addr,
        to: Ipv6Addr,
        from: &[Ipv6Addr],
    ) -> Result<(), DatapathError> {
        self.tables.set_peer(hoa.octets(), to.octets(), from)
    }

    /// Holds packets to a peer, as those to one that is not known, but accepts what comes from `from`
    /// as the peer's.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn hold_peer(&mut self, hoa: Ipv6Addr, from: &[Ipv6Addr]) -> Result<(), DatapathError> {
        self.tables.hold_peer(hoa.octets(), from)
    }

    /// Forgets a peer: packets to it are held again.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn remove_peer(&mut self, hoa: Ipv6Addr) -> Result<(), DatapathError> {
        self.tables.remove_peer(hoa.octets())
    }

    /// All peers, those of an earlier daemon included, and their use.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn peers_used(&self) -> Result<Vec<(Ipv6Addr, Usage)>, DatapathError> {
        self.tables.peers_used()
    }

    /// Becomes readable when a frame is held.
    pub fn held_fd(&self) -> BorrowedFd<'_> {
        self.tables.held.as_fd()
    }

    /// Takes the frames that are held, with their checksums finished.
    pub fn take_held(&mut self) -> Vec<HeldFrame> {
        let mut frames = Vec::new();
        while let Some(record) = self.tables.held.next() {
            let Some(record) = record::read::<Held>(&record) else {
                continue;
            };
            let length = usize::try_from(record.length).unwrap_or(usize::MAX);
            let mut frame = record.frame.get(..length).unwrap_or_default().to_vec();
            held::finish_checksum(&mut frame);
            frames.push(HeldFrame {
                peer: address(record.peer).into(),
                frame,
            });
        }
        frames
    }

    /// Sends a held frame, by `mat0` once more. If its peer is still not known it is held again.
    ///
    /// # Errors
    ///
    /// What the kernel says, for instance that the frame is longer than the MTU.
    pub fn release(&mut self, frame: &[u8]) -> io::Result<()> {
        if frame.is_empty() {
            return Ok(());
        }
        self.socket.send(frame).map(drop)
    }

    /// Tells the application that sent a frame that its peer cannot be reached.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn refuse(&mut self, frame: &[u8]) -> io::Result<()> {
        match held::unreachable(frame, self.device.mac) {
            Some(error) => self.socket.send(&error).map(drop),
            None => Ok(()),
        }
    }

    /// Has the kernel report anew what is joined on `mat0`, as it does by itself for a NIC when the VM
    /// has arrived somewhere.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn report_memberships(&mut self) -> io::Result<()> {
        let hoa = address(self.node.hoa).into();
        self.socket
            .send(&query::to_self(hoa, self.device.mac))
            .map(drop)
    }

    /// Forgets the path MTUs that were learnt of peers: a path has changed, at either end. Also takes
    /// the MTUs of the NICs as they are now.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Device`].
    pub fn path_changed(&mut self) -> Result<(), DatapathError> {
        self.device.fit(&self.nics)?;
        self.follow_routes()?;
        self.device.route()
    }

    /// All counters.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn counters(&self) -> Result<Vec<(Counter, u64)>, DatapathError> {
        self.tables.counters()
    }

    /// Takes away all of it: programs, maps, `mat0`. Without this they stay at work.
    ///
    /// # Errors
    ///
    /// See [`DatapathError`].
    pub fn detach(mut self) -> Result<(), DatapathError> {
        if self.all_multicast {
            self.device
                .all_multicast(self.node.multicast_ifindex, false)?;
        }
        self.pins.clear()?;
        for nic in &self.nics {
            self.device.forget_routes(nic)?;
        }
        self.device.remove()
    }

    fn publish(&mut self) -> Result<(), DatapathError> {
        self.tables.set_node(self.node)
    }
}

/// Ones for the bits of the home prefix.
fn mask(hoa: Ipv6Addr, (prefix, length): (Ipv6Addr, u8)) -> Result<Ipv6Addr, DatapathError> {
    let error = DatapathError::NotHome {
        hoa,
        prefix,
        length,
    };
    if length > 128 {
        return Err(error);
    }
    let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
    let mask = Ipv6Addr::from_bits(!host);
    if hoa & mask == prefix & mask {
        Ok(mask)
    } else {
        Err(error)
    }
}

/// The verifier's log may be megabytes; its end says why.
fn load_error(error: &dyn std::error::Error) -> DatapathError {
    const LOG_LINES: usize = 6;
    let text = chain(error);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines.get(lines.len().saturating_sub(LOG_LINES)..);
    DatapathError::Load(match (lines.first(), tail) {
        (Some(first), Some(tail)) if lines.len() > LOG_LINES => {
            format!("{first} .. {}", tail.join(" "))
        }
        _ => text,
    })
}
