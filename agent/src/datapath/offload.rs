//! Which aggregates (GSO) an interface accepts whole, from its ethtool features.

use std::io;
use std::mem::size_of;

use common::maps::Gate;
use nix::net::if_::if_indextoname;

use super::ethtool::{Command, ask, text};

const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
/// `ETH_SS_FEATURES`: string set with the names of the features.
const FEATURE_NAMES: u32 = 4;
/// Capacity of the structures below; the kernel has 64 features.
const MOST_FEATURES: usize = 128;
const FEATURES_PER_BLOCK: usize = 32;

/// The kernel's name of each feature, and the flag of [`Gate::splits`] to set if the feature is
/// off.
const WHOLE: [(&str, u32); 3] = [
    ("tx-tcp-segmentation", Gate::SPLITS_TCP4),
    ("tx-tcp6-segmentation", Gate::SPLITS_TCP6),
    ("tx-udp-segmentation", Gate::SPLITS_UDP),
];

/// `struct ethtool_sset_info` with room for one number: 24 bytes.
#[repr(C)]
struct SetInfo {
    command: u32,
    reserved: u32,
    mask: u64,
    count: u32,
    pad: u32,
}

/// `struct ethtool_gstrings`: 4108 bytes.
#[repr(C)]
struct Names {
    command: u32,
    set: u32,
    count: u32,
    names: [[u8; 32]; MOST_FEATURES],
}

/// `struct ethtool_gfeatures`: 72 bytes.
#[repr(C)]
struct Features {
    command: u32,
    blocks: u32,
    features: [Block; MOST_FEATURES / FEATURES_PER_BLOCK],
}

/// `struct ethtool_get_features_block`: 16 bytes.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Block {
    available: u32,
    requested: u32,
    active: u32,
    never_changed: u32,
}

const _: () = {
    assert!(size_of::<SetInfo>() == 24);
    assert!(size_of::<Names>() == 12 + 32 * MOST_FEATURES);
    assert!(size_of::<Features>() == 72);
};

impl Command for SetInfo {}
impl Command for Names {}
impl Command for Features {}

/// Returns the aggregates that a TAP does not accept whole ([`Gate::splits`]), in the network
/// namespace of the calling thread.
///
/// # Errors
///
/// The error of the kernel.
pub(super) fn splits(ifindex: u32) -> io::Result<u32> {
    let interface = if_indextoname(ifindex)?;
    let interface = interface.to_str().map_err(io::Error::other)?;
    let mut info = SetInfo {
        command: ETHTOOL_GSSET_INFO,
        reserved: 0,
        mask: 1 << FEATURE_NAMES,
        count: 0,
        pad: 0,
    };
    ask(interface, &mut info)?;
    // The kernel writes all names, so the buffer must have room for all.
    if info.count as usize > MOST_FEATURES {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let mut names = Names {
        command: ETHTOOL_GSTRINGS,
        set: FEATURE_NAMES,
        count: info.count,
        names: [[0; 32]; MOST_FEATURES],
    };
    ask(interface, &mut names)?;
    let mut features = Features {
        command: ETHTOOL_GFEATURES,
        blocks: (MOST_FEATURES / FEATURES_PER_BLOCK) as u32,
        features: Default::default(),
    };
    ask(interface, &mut features)?;
    let is_active = |wanted: &str| {
        let index = names.names.iter().position(|name| text(name) == wanted);
        index.is_some_and(|index| {
            (features.features.get(index / FEATURES_PER_BLOCK))
                .is_some_and(|block| block.active >> (index % FEATURES_PER_BLOCK) & 1 == 1)
        })
    };
    let missing = WHOLE.iter().filter(|(name, _)| !is_active(name));
    Ok(missing.fold(0, |splits, (_, flag)| splits | flag))
}
