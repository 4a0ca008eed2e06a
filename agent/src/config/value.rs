//! Types of values that check themselves during deserialization.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, de};

use common::signal::{MAX_TEXT_BYTES, PORT};

/// Longest name of an interface, bytes (`IFNAMSIZ` less the final zero).
const MAX_INTERFACE_NAME_BYTES: usize = 15;
/// Longest DNS name, bytes (RFC 1035 §2.3.4).
const MAX_HOST_BYTES: usize = 253;

/// Why a value is refused. The reader of the file adds line and key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// The text is not the name of an agent.
    #[error("\"{0}\" is no agent name; use 1 to 63 letters, digits, '.', '-' and '_'")]
    Name(String),
    /// The text is not the name of an interface.
    #[error("\"{0}\" is no interface name; use 1 to 15 characters without space, '/' and ':'")]
    Interface(String),
    /// The text is not a prefix.
    #[error("\"{0}\" is no IPv6 prefix; write it like 2001:db8:2::/64")]
    Prefix(String),
    /// The text is not a peer's address.
    #[error("\"{0}\" is no peer address; write 2001:db8::2, [2001:db8::2]:47411 or a DNS name")]
    PeerAddress(String),
}

/// Name of an agent, as in its certificate; in lower case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Name(String);

/// Name of a network interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct InterfaceName(String);

macro_rules! text {
    ($($name:ident),*) => {
        $(impl $name {
            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        })*
    };
}
text!(Name, InterfaceName);

impl TryFrom<String> for Name {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if (1..=63).contains(&text.len()) && text.chars().all(good) {
            // Names in certificates compare without case (RFC 4343).
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err(ValueError::Name(text))
        }
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        let good = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':');
        let fits = (1..=MAX_INTERFACE_NAME_BYTES).contains(&text.len());
        if fits && text.chars().all(good) && text != "." && text != ".." {
            Ok(Self(text))
        } else {
            Err(ValueError::Interface(text))
        }
    }
}

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

/// Address of a peer: an IPv6 address or a DNS name, and a TCP port.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PeerAddress {
    /// IPv6 address (without brackets) or DNS name.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl PeerAddress {
    /// Returns the host as a URI writes it: an IPv6 address stands in brackets (RFC 3986 §3.2.2).
    pub fn bracketed_host(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]", self.host)
        } else {
            self.host.clone()
        }
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.bracketed_host(), self.port)
    }
}

impl TryFrom<String> for PeerAddress {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        let port = |port: &str| port.parse().ok().filter(|&port| port != 0);
        let parsed = if text.parse::<Ipv6Addr>().is_ok() {
            Some((text.as_str(), PORT))
        } else if let Some(rest) = text.strip_prefix('[') {
            match rest.split_once(']') {
                Some((host, "")) => Some((host, PORT)),
                Some((host, rest)) => rest
                    .strip_prefix(':')
                    .and_then(port)
                    .map(|port| (host, port)),
                None => None,
            }
            .filter(|(host, _)| Ipv6Addr::from_str(host).is_ok())
        } else {
            match text.split_once(':') {
                Some((host, rest)) => port(rest).map(|port| (host, port)),
                None => Some((text.as_str(), PORT)),
            }
            .filter(|(host, _)| is_host(host))
        };
        match parsed {
            Some((host, port)) => Ok(Self {
                host: host.to_owned(),
                port,
            }),
            None => Err(ValueError::PeerAddress(text)),
        }
    }
}

/// Returns true if the text has the form of a DNS name (RFC 1123 §2.1).
fn is_host(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    text.len() <= MAX_HOST_BYTES && text.split('.').all(label)
}

/// Deserializes an integer in `MIN..=MAX`.
pub(super) fn ranged<'de, const MIN: u64, const MAX: u64, D, T>(d: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let number = i64::deserialize(d)?;
    u64::try_from(number)
        .ok()
        .filter(|number| (MIN..=MAX).contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| de::Error::custom(format!("{number} is not in {MIN} to {MAX}")))
}

/// Deserializes a power of two, at most `MAX`.
pub(super) fn power_of_two<'de, const MAX: u64, D>(d: D) -> Result<u32, D::Error>
where
    D: Deserializer<'de>,
{
    ranged::<1, MAX, D, u32>(d).and_then(|number| {
        if number.is_power_of_two() {
            Ok(number)
        } else {
            Err(de::Error::custom(format!(
                "{number} is not a power of two; take {} or {}",
                number.next_power_of_two() / 2,
                number.next_power_of_two()
            )))
        }
    })
}

/// Deserializes a duration of `MIN..=MAX` milliseconds.
pub(super) fn milliseconds<'de, const MIN: u64, const MAX: u64, D>(
    d: D,
) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    ranged::<MIN, MAX, D, u64>(d).map(Duration::from_millis)
}

/// Deserializes a duration of `MIN..=MAX` seconds.
pub(super) fn seconds<'de, const MIN: u64, const MAX: u64, D>(d: D) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    ranged::<MIN, MAX, D, u64>(d).map(Duration::from_secs)
}

/// Deserializes a URI with a scheme; libvirt checks the rest.
pub(super) fn uri<'de, D>(d: D) -> Result<String, D::Error>
where
    D: Deserializer<'de>,
{
    let text = String::deserialize(d)?;
    let fits = text.len() <= MAX_TEXT_BYTES && text.chars().all(|c| c.is_ascii_graphic());
    if fits
        && text
            .split_once(':')
            .is_some_and(|(scheme, _)| !scheme.is_empty())
    {
        Ok(text)
    } else {
        Err(de::Error::custom(format!(
            "\"{text}\" is no URI; write it like qemu:///system"
        )))
    }
}

/// Deserializes a URI that may be empty.
pub(super) fn optional_uri<'de, D>(d: D) -> Result<Option<String>, D::Error>
where
    D: Deserializer<'de>,
{
    uri(d).map(Some)
}
