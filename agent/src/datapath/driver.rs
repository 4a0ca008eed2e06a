//! What an interface's driver says about itself (`SIOCETHTOOL`), for the choice of a hook.
#![allow(unsafe_code, reason = "SIOCETHTOOL is an ioctl")]

use std::ffi::CStr;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

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

/// `struct ifreq` with a pointer: 40 bytes.
#[repr(C)]
struct Request {
    name: [u8; libc::IF_NAMESIZE],
    data: *mut libc::c_void,
    pad: [u8; 16],
}

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

const _: () = {
    assert!(size_of::<Request>() == 40);
    assert!(size_of::<DriverInfo>() == 196);
};

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

/// Sends a command and receives its answer, in the network namespace of the calling thread.
fn ask<T>(interface: &str, command: &mut T) -> io::Result<()> {
    let mut name = [0; libc::IF_NAMESIZE];
    name.get_mut(..interface.len())
        .filter(|_| interface.len() < libc::IF_NAMESIZE)
        .ok_or(io::ErrorKind::InvalidInput)?
        .copy_from_slice(interface.as_bytes());
    let mut request = Request {
        name,
        data: (&raw mut *command).cast(),
        pad: [0; 16],
    };
    let socket = socket(
        AddressFamily::Inet6,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: `request` and the command that it points to are live, and the command is one of the
    // structures above, whose first field tells the kernel its size.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn text(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes).map_or_else(
        |_| String::new(),
        |text| text.to_string_lossy().into_owned(),
    )
}
