//! The data path of a mobile node: `mat0`, the eBPF programs and their maps. No other module uses
//! aya.
//!
//! ```text
//!  mat0 --TC egress---> mat_out --> active NIC, multicast NIC
//!                        ^ NODE, PEERS          '--> HELD --> daemon --> mat0 again
//!  NIC  --TC ingress--> mat_in ---> mat0
//!                        ^ NODE, PEER_MOAS, OWN_MOAS
//! ```
//!
//! Maps and links are pinned (`pins`): the programs keep running without a daemon, and the next
//! daemon with the same HoA adopts them with the peers. Only [`Datapath::detach`] removes them.
//!
//! The kernel looks up the next hop of every packet among the routes of the active NIC (`routes`).
//!
//! The price of mobility: between two nodes that know each other all traffic is mobile. A packet
//! from a peer's MoA arrives at the HoA, so the MoAs themselves cannot have a connection, except on
//! the ports of the daemons and of the IMS.
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
use linux::bpf::pins::PinError;
use linux::bpf::record;
use linux::bpf::refusal::refusal;
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

/// Why an operation on the data path failed.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The kernel lacks TCX.
    #[error(
        "This kernel has no TCX (Linux 6.6), which nodes need; moves and streams work without a node"
    )]
    NoTcx,
    /// Another daemon has locked the pins.
    #[error("Another `migkick node` runs here; stop it first")]
    InUse,
    /// An interface of another kind is named `mat0`.
    #[error("Interface mat0 is none of migkick's; rename it")]
    DeviceTaken,
    /// The prefix length exceeds 128, or the HoA is not in the home prefix.
    #[error("{hoa} is not in the home prefix {prefix}/{length}; correct the key file")]
    NotHome {
        /// Home address of this node.
        hoa: Ipv6Addr,
        /// Home prefix, with the length in `length`.
        prefix: Ipv6Addr,
        /// Prefix length in bits.
        length: u8,
    },
    /// A step in the setup of `mat0` or of a NIC failed.
    #[error("Cannot {step} for mat0; run migkick as root")]
    Device {
        /// The step, as an infinitive.
        step: &'static str,
        /// Error of the kernel.
        #[source]
        source: io::Error,
    },
    /// Another user can add or replace pins in the directory.
    #[error(
        "Others can change what is in {0} (owner {owner}, mode {mode:o}), and so what the kernel programs do; run `rm -r {0}` and start migkick again",
        path.display()
    )]
    PinsOfOthers {
        /// Directory with the wrong owner or mode.
        path: PathBuf,
        /// User ID of its owner.
        owner: u32,
        /// Permission bits of the directory, as in `chmod`.
        mode: u32,
    },
    /// A pin cannot be created, read or removed.
    #[error("Cannot use {}; run migkick as root", path.display())]
    Pin {
        /// Path of the pin.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        source: io::Error,
    },
    /// The kernel refused the programs or maps; the text is the end of the verifier's log.
    #[error(
        "Cannot load the kernel programs: {0}; migkick needs root or CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"
    )]
    Load(String),
    /// A map or program is missing, or has another layout.
    #[error("Map or program {name} is not of this version's layout; remove /sys/fs/bpf/migkick")]
    Layout {
        /// Name of the map or program in the object file.
        name: &'static str,
    },
    /// A map operation failed, for instance because the map is full.
    #[error("Map {name}: {reason}")]
    Map {
        /// Name of the map in the object file.
        name: &'static str,
        /// Error of the kernel, as text.
        reason: String,
    },
    /// A program cannot be attached.
    #[error("Cannot attach {program} to {interface}: {reason}")]
    Attach {
        /// Name in the kernel: `mat_out` or `mat_in`.
        program: &'static str,
        /// Name of the interface.
        interface: String,
        /// Error of the kernel, as text.
        reason: String,
    },
}

impl From<PinError> for DatapathError {
    fn from(error: PinError) -> Self {
        match error {
            PinError::InUse(_) => Self::InUse,
            PinError::OfOthers { path, owner, mode } => Self::PinsOfOthers { path, owner, mode },
            PinError::Pin { path, error } => Self::Pin {
                path,
                source: error,
            },
        }
    }
}

/// Handle of the data path; see the [module documentation](self).
pub struct Datapath {
    pins: Pins,
    programs: Ebpf,
    tables: Tables,
    device: Device,
    /// Sends frames through `mat0`.
    socket: PacketSocket,
    nics: Vec<Interface>,
    node: Node,
    /// Routes of the network to which a NIC is about to move.
    planned: Vec<RouteMessage>,
    /// Whether this data path enabled all-multicast on the multicast NIC.
    all_multicast: bool,
}

impl Datapath {
    /// Creates `mat0` with the HoA and the route of the home prefix, loads the programs, and
    /// attaches them to `mat0` and the NICs. Adopts the state of an earlier daemon with the same
    /// HoA, including its peers. The multicast NIC stays if it is among `nics`; otherwise the first
    /// of `nics` becomes the multicast NIC. No NIC becomes active.
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
            // The earlier daemon enabled all-multicast.
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

    /// Accepts packets on an additional NIC.
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

    /// Copies the current routes of the NICs. Call this after each change of them.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Device`].
    pub fn follow_routes(&mut self) -> Result<(), DatapathError> {
        self.device.follow_routes(&self.nics, &self.planned)
    }

    /// Removes a NIC that no longer exists.
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

    /// Sends by this NIC and from this MoA, starting with the next packet.
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

    /// Adds the routes of a network for packets that leave by this NIC once the NIC is active.
    /// `network` is an address of the network with the prefix length, `router` the router if known.
    /// No other traffic uses these routes. They can therefore be added before the NIC is in the
    /// network, and the switch is then a single map update.
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

    /// Removes the planned routes: the main table has them now, or nobody needs them.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Device`].
    pub fn forget_plan(&mut self) -> Result<(), DatapathError> {
        self.planned.clear();
        self.follow_routes()
    }

    /// Sends and receives the multicast of `mat0` by this NIC, with the NIC's current link-local
    /// address. Without a link-local address the MLD messages of `mat0` are not sent; call this
    /// again once there is one.
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

    /// Accepts packets to these MoAs and to the active MoA only.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn set_own(&mut self, moas: &[Ipv6Addr]) -> Result<(), DatapathError> {
        self.tables.set_own(address(self.node.hoa), moas)
    }

    /// Sends packets for a peer to `to`, and accepts packets from the addresses in `from`, which
    /// include `to`, as the peer's. Packets from the peer's other MoAs are no longer accepted.
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

    /// Holds packets to a peer, as for an unknown peer, but accepts packets from the addresses in
    /// `from` as the peer's.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn hold_peer(&mut self, hoa: Ipv6Addr, from: &[Ipv6Addr]) -> Result<(), DatapathError> {
        self.tables.hold_peer(hoa.octets(), from)
    }

    /// Removes a peer: packets to it are held again.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn remove_peer(&mut self, hoa: Ipv6Addr) -> Result<(), DatapathError> {
        self.tables.remove_peer(hoa.octets())
    }

    /// Returns all peers, including those of an earlier daemon, with their usage.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn peers_used(&self) -> Result<Vec<(Ipv6Addr, Usage)>, DatapathError> {
        self.tables.peers_used()
    }

    /// Returns a descriptor that is readable while frames are held.
    pub fn held_fd(&self) -> BorrowedFd<'_> {
        self.tables.held.as_fd()
    }

    /// Returns the held frames with completed checksums.
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

    /// Sends a held frame through `mat0` again. If the peer is still unknown, the frame is held
    /// again.
    ///
    /// # Errors
    ///
    /// The error of the kernel, for instance that the frame exceeds the MTU.
    pub fn release(&mut self, frame: &[u8]) -> io::Result<()> {
        if frame.is_empty() {
            return Ok(());
        }
        self.socket.send(frame).map(drop)
    }

    /// Reports to the application that sent a frame that its peer is unreachable.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn refuse(&mut self, frame: &[u8]) -> io::Result<()> {
        match held::unreachable(frame, self.device.mac) {
            Some(error) => self.socket.send(&error).map(drop),
            None => Ok(()),
        }
    }

    /// Makes the kernel report the memberships of `mat0` again, as the kernel does for a NIC after
    /// the VM has migrated.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    pub fn report_memberships(&mut self) -> io::Result<()> {
        let hoa = address(self.node.hoa).into();
        self.socket
            .send(&query::to_self(hoa, self.device.mac))
            .map(drop)
    }

    /// Discards the learnt path MTUs, because a path changed at either end. Also updates the MTU of
    /// `mat0` and the routes.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Device`].
    pub fn path_changed(&mut self) -> Result<(), DatapathError> {
        self.device.fit(&self.nics)?;
        self.follow_routes()?;
        self.device.route()
    }

    /// Returns all counters, zero ones included.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Map`].
    pub fn counters(&self) -> Result<Vec<(Counter, u64)>, DatapathError> {
        self.tables.counters()
    }

    /// Removes the programs, the maps and `mat0`. Otherwise they outlive this value.
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

/// Returns the mask of the home prefix; fails if the HoA is not in the prefix.
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

fn load_error(name: &str, error: &dyn std::error::Error) -> DatapathError {
    DatapathError::Load(refusal(name, error))
}
