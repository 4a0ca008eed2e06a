//! Properties of an interface's driver (`SIOCETHTOOL`) that decide between XDP and TC.

use std::io;
use std::mem::size_of;

use super::ethtool::{Command, ask, text};

const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GFLAGS: u32 = 0x25;
/// `ETH_FLAG_RXVLAN`: the card moves VLAN tags out of the frames.
const RX_VLAN: u32 = 1 << 8;

/// Drivers whose packets may have a partial checksum, and drivers of interfaces that only pass
/// on packets of other interfaces.
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

/// Why XDP must not restore packets on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoXdp {
    /// A virtual interface: packets may have a partial checksum.
    Software(String),
    /// The card moves VLAN tags out of the frames, where XDP does not see them.
    VlanOffload,
    /// The driver does not report its properties.
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

/// Checks that native XDP on an interface sees whole frames with complete checksums.
///
/// # Errors
///
/// The reason against XDP, or the reason why the properties are unknown.
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
