//! Addresses of agents, relays and servers on the signalling network.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use common::signal::PORT;
use serde::Deserialize;

use super::ValueError;

/// Longest DNS name, bytes (RFC 1035 §2.3.4).
const MAX_HOST_BYTES: usize = 253;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_addresses_take_a_port_or_the_default() {
        for (text, expected) in [
            ("2001:db8::2", "[2001:db8::2]:47411"),
            ("[2001:db8::2]", "[2001:db8::2]:47411"),
            ("[2001:db8::2]:7", "[2001:db8::2]:7"),
            ("vms2.example", "vms2.example:47411"),
            ("vms2:7", "vms2:7"),
        ] {
            let address = PeerAddress::try_from(text.to_owned()).unwrap();
            assert_eq!(address.to_string(), expected);
        }
        for text in [
            "", "[::1", "[::1]x", "[v6]:1", "a:b:c", "a:0", "a b", "-a", "[::1]:",
        ] {
            assert!(PeerAddress::try_from(text.to_owned()).is_err(), "{text}");
        }
    }
}
