//! The number of a bridge in the keys of the maps.
//!
//! | map | key | value | written by |
//! |---|---|---|---|
//! | `BRIDGES` | [`BridgeNumber`] | [`Bridge`] | agent |
//!
//! Each bridge has its own set of programs over the same maps. A program learns the number of its
//! bridge when it is loaded, so no packet pays for a look-up.

/// Number of a bridge, part of every key that names a group or a flow: 2 bytes, align 2.
///
/// A number has a meaning on one host only. Hosts never compare the numbers of each other.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BridgeNumber(pub u16);

/// Number in keys that belong to no bridge: the streams of a relay, and flows as two hosts name them
/// to each other.
pub const NO_BRIDGE: BridgeNumber = BridgeNumber(0);

/// Limit of the bridges of one host; their numbers are 1 to `MAX_BRIDGES`.
pub const MAX_BRIDGES: u16 = 64;

/// Value of `BRIDGES`: 20 bytes, align 4. The bridge that has the number.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// Index of the bridge.
    pub ifindex: u32,
    /// Name of the bridge, followed by zeros.
    pub name: [u8; 16],
}

/// A VLAN of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Network {
    /// Bridge of the network.
    pub bridge: BridgeNumber,
    /// VLAN identifier, 0 for untagged.
    pub vlan: u16,
}

const _: () = {
    assert!(size_of::<BridgeNumber>() == 2 && align_of::<BridgeNumber>() == 2);
    assert!(size_of::<Bridge>() == 20 && align_of::<Bridge>() == 4);
};

impl BridgeNumber {
    /// Number of the first bridge of a host.
    pub const FIRST: Self = Self(1);

    /// Returns the numbers that a bridge can have, the lowest first.
    pub fn all() -> impl Iterator<Item = Self> {
        (1..=MAX_BRIDGES).map(Self)
    }
}
