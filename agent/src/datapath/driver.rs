//! What an interface's driver says about itself (`SIOCETHTOOL`), for the choice of a hook.

use std::io;
use std::mem::size_of;

use super::ethtool::{Command, ask, text};

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GFLAGS: u32 = 0x25;
/// `ETH_FLAG_RXVLAN`.
const RX_VLAN: u32 = 1 << 8;

/// Drivers whose packets may come with a checksum that is not finished, and those of interfaces
/// that only pass on what other ones received.
const SOFTWARE: [&str; 14] = [
    "802.1Q VLAN Support",
    "bonding",
    "bridge",
    "dummy",
    "hv_netvsc",
    "ipvlan",
    "macvlan",
    "netvsc",
    "openvswitch",
    "team",
    "tun",
    "veth",
    "virtio_net",
    "vmxnet3",
];

/// `struct ethtool_drvinfo`: 196 bytes.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware_version: [u8; 32],
    bus: [u8; 32],
    rom_version: [u8; 32],
    reserved: [u8; 12],
    numbers: [u32; 5],
}

/// `struct ethtool_value`: 8 bytes.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

const _: () = assert!(size_of::<DriverInfo>() == 196);

impl Command for DriverInfo {}
impl Command for Value {}

/// Why packets of an interface should not be restored by XDP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoXdp {
    /// It is made of software, so checksums may not be finished yet.
    Software(String),
    /// The card takes VLAN tags out of the frames, and XDP would not see them.
    VlanOffload,
    /// The driver does not say what it is.
    Unknown(io::ErrorKind),
}

impl std::fmt::Display for NoXdp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Software(driver) => write!(f, "{driver} is no driver of a physical interface"),
            Self::VlanOffload => f.write_str(
                "the card takes VLAN tags out of the frames; `ethtool -K INTERFACE rxvlan off` \
                 lets it use XDP",
            ),
            Self::Unknown(kind) => write!(f, "its driver is not known: {kind}"),
        }
    }
}

/// Whether native XDP on an interface sees whole frames with finished checksums.
///
/// # Errors
///
/// The reason why not, or why that cannot be known.
pub(super) fn suits_xdp(interface: &str) -> Result<(), NoXdp> {
    let unknown = |error: io::Error| NoXdp::Unknown(error.kind());
    let mut info = DriverInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        version: [0; 32],
        firmware_version: [0; 32],
        bus: [0; 32],
        rom_version: [0; 32],
        reserved: [0; 12],
        numbers: [0; 5],
    };
    ask(interface, &mut info).map_err(unknown)?;
    let driver = text(&info.driver);
    if SOFTWARE.contains(&driver.as_str()) || text(&info.bus).is_empty() {
        return Err(NoXdp::Software(driver));
    }
    let mut flags = Value {
        command: ETHTOOL_GFLAGS,
        data: 0,
    };
    ask(interface, &mut flags).map_err(unknown)?;
    if flags.data & RX_VLAN != 0 {
        return Err(NoXdp::VlanOffload);
    }
    Ok(())
}
