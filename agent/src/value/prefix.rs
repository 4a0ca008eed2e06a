//! IPv6 prefixes.

use std::fmt;
use std::net::Ipv6Addr;

use serde::Deserialize;

use super::ValueError;

/// An IPv6 prefix, host bits zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Prefix {
    /// Network address; all bits behind the prefix are 0.
    pub address: Ipv6Addr,
    /// Length of the prefix in bits, 1 to 128.
    pub length: u8,
}

impl Prefix {
    /// Returns the length in bits.
    pub fn length(self) -> u8 {
        self.length
    }

    /// Returns the prefix of `length` bits (1 to 128) that contains `address`.
    pub fn of(address: Ipv6Addr, length: u8) -> Self {
        let length = length.clamp(1, 128);
        let mask = u128::MAX << (128 - u32::from(length));
        Self {
            address: Ipv6Addr::from_bits(address.to_bits() & mask),
            length,
        }
    }

    /// Returns true if the prefix contains `address`.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        Self::of(address, self.length) == self
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl TryFrom<String> for Prefix {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        let parsed = text.split_once('/').and_then(|(address, length)| {
            let address: Ipv6Addr = address.parse().ok()?;
            let length: u8 = length.parse().ok().filter(|n| (1..=128).contains(n))?;
            Some(Self { address, length })
        });
        match parsed {
            Some(prefix) if Self::of(prefix.address, prefix.length) == prefix => Ok(prefix),
            _ => Err(ValueError::Prefix(text)),
        }
    }
}
