//! Interface identifiers of IPv6 addresses: stable privacy (RFC 7217) and EUI-64 (RFC 4291 appendix
//! A).

use std::hash::Hasher;
use std::net::Ipv6Addr;
use std::path::Path;

use common::mat::neutral::neutral;

/// Scheme for the interface identifier of a new address.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Scheme {
    /// From a secret, the prefix and the NIC (RFC 7217).
    StablePrivacy,
    /// From the NIC's MAC (RFC 4291 appendix A).
    Eui64,
}

/// The secret key of RFC 7217 §5.
#[derive(Clone, Copy)]
pub(crate) struct Secret(u128);

/// Why the program cannot choose an address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IdentifierError {
    /// Neither the user nor the machine supplies a secret.
    #[error(
        "No secret for a stable address in /etc/machine-id or the VM's UUID; give --secret HEX, or --interface-identifier eui64"
    )]
    NoSecret,
    /// The user's secret is malformed.
    #[error("The secret must have 32 hexadecimal digits; take them from `openssl rand -hex 16`")]
    BadSecret,
    /// The prefix leaves too few bits for an identifier.
    #[error(
        "Prefix {prefix}/{length} of the destination is too long for a {scheme} address; the operator must set agent.prefix there"
    )]
    Prefix {
        /// Prefix of the destination's network.
        prefix: Ipv6Addr,
        /// Length of the prefix, bits.
        length: u8,
        /// Name of the scheme on the command line.
        scheme: &'static str,
    },
}

/// Files with a stable number that is unique to this VM: systemd's machine identifier, and the
/// domain UUID from libvirt.
const SECRET_FILES: [&str; 2] = ["/etc/machine-id", "/sys/class/dmi/id/product_uuid"];

impl Secret {
    /// Parses 32 hexadecimal digits, with or without hyphens.
    pub(crate) fn parse(text: &str) -> Result<Self, IdentifierError> {
        let digits: String = text.trim().chars().filter(|&c| c != '-').collect();
        if digits.len() != 32 || !digits.chars().all(|c| c.is_ascii_hexdigit()) {
            return Err(IdentifierError::BadSecret);
        }
        u128::from_str_radix(&digits, 16)
            .map(Self)
            .map_err(|_| IdentifierError::BadSecret)
    }

    /// Reads the secret from the machine's identifier files.
    pub(crate) fn of_machine() -> Result<Self, IdentifierError> {
        SECRET_FILES
            .iter()
            .filter_map(|path| std::fs::read_to_string(Path::new(path)).ok())
            .find_map(|text| Self::parse(&text).ok())
            .ok_or(IdentifierError::NoSecret)
    }
}

/// Returns an address in `prefix` for the NIC with `mac`, other than `taken`. `counter` is the
/// DAD_Counter of RFC 7217 §5.
pub(crate) fn address(
    scheme: Scheme,
    secret: impl FnOnce() -> Result<Secret, IdentifierError>,
    (prefix, length): (Ipv6Addr, u8),
    mac: [u8; 6],
    taken: Ipv6Addr,
) -> Result<Ipv6Addr, IdentifierError> {
    let too_long = |scheme| IdentifierError::Prefix {
        prefix,
        length,
        scheme,
    };
    match scheme {
        Scheme::Eui64 => {
            if length > 64 {
                return Err(too_long("EUI-64"));
            }
            let [a, b, c, d, e, f] = mac;
            let identifier = u64::from_be_bytes([a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
            Ok(join(prefix, length, identifier))
        }
        Scheme::StablePrivacy => {
            if length > 96 {
                return Err(too_long("stable-privacy"));
            }
            let secret = secret()?;
            (0..=u8::MAX)
                .map(|counter| {
                    let identifier = stable(secret, prefix, mac, counter);
                    (identifier, join(prefix, length, identifier))
                })
                .find(|&(identifier, address)| !is_reserved(identifier) && address != taken)
                .map(|(_, address)| address)
                .ok_or(too_long("stable-privacy"))
        }
    }
}

/// Returns an address like [`address`], but neutral to `hoa` ([`common::mat::neutral`]) and not
/// `is_taken`.
pub(crate) fn neutral_address(
    scheme: Scheme,
    secret: impl Fn() -> Result<Secret, IdentifierError>,
    (prefix, length): (Ipv6Addr, u8),
    mac: [u8; 6],
    hoa: Ipv6Addr,
    is_taken: impl Fn(Ipv6Addr) -> bool,
) -> Result<Ipv6Addr, IdentifierError> {
    let no_room = |scheme| IdentifierError::Prefix {
        prefix,
        length,
        scheme,
    };
    let usable = |address: Ipv6Addr| {
        let address = Ipv6Addr::from(neutral(address.octets(), hoa.octets()));
        let identifier = address.to_bits() as u64;
        (!is_reserved(identifier) && !is_taken(address)).then_some(address)
    };
    match scheme {
        Scheme::Eui64 => {
            let made = address(scheme, secret, (prefix, length), mac, Ipv6Addr::UNSPECIFIED)?;
            usable(made).ok_or(no_room("EUI-64"))
        }
        Scheme::StablePrivacy if length > 96 => Err(no_room("stable-privacy")),
        Scheme::StablePrivacy => {
            let secret = secret()?;
            (0..=u8::MAX)
                .map(|counter| join(prefix, length, stable(secret, prefix, mac, counter)))
                .find_map(usable)
                .ok_or(no_room("stable-privacy"))
        }
    }
}

/// F() of RFC 7217 §5: SipHash-2-4, a pseudo-random function with a 128-bit key. Net_Iface is the
/// MAC, which a migration keeps.
fn stable(secret: Secret, prefix: Ipv6Addr, mac: [u8; 6], counter: u8) -> u64 {
    #[allow(
        deprecated,
        reason = "the only SipHash with a key in std; deprecated for hash tables, not for this"
    )]
    let mut hasher = std::hash::SipHasher::new_with_keys((secret.0 >> 64) as u64, secret.0 as u64);
    hasher.write(&prefix.octets());
    hasher.write(&mac);
    hasher.write(&[counter]);
    hasher.finish()
}

/// Whether the identifier is reserved (RFC 5453 and the IANA registry).
fn is_reserved(identifier: u64) -> bool {
    identifier == 0
        || (0x0200_5eff_fe00_0000..=0x0200_5eff_feff_ffff).contains(&identifier)
        || (0xfdff_ffff_ffff_ff80..=0xfdff_ffff_ffff_ffff).contains(&identifier)
}

fn join(prefix: Ipv6Addr, length: u8, identifier: u64) -> Ipv6Addr {
    let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
    Ipv6Addr::from_bits((prefix.to_bits() & !host) | (u128::from(identifier) & host))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
    const PREFIX: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0), 64);
    const TAKEN: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, 0x10);

    fn secret() -> Result<Secret, IdentifierError> {
        Secret::parse("00112233-4455-6677-8899-aabbccddeeff\n")
    }

    #[test]
    fn eui64_address_is_that_of_the_kernel() {
        let address = address(Scheme::Eui64, secret, PREFIX, MAC, TAKEN).unwrap();
        assert_eq!(address.to_string(), "2001:db8:2:0:5054:ff:fe12:3456");
    }

    #[test]
    fn stable_address_is_the_same_again_and_another_elsewhere() {
        let make =
            |prefix, mac| address(Scheme::StablePrivacy, secret, prefix, mac, TAKEN).unwrap();
        let here = make(PREFIX, MAC);
        assert_eq!(here, make(PREFIX, MAC));
        let other_prefix = ("2001:db8:3::".parse().unwrap(), 64);
        assert_ne!(
            here.segments()[4..],
            make(other_prefix, MAC).segments()[4..]
        );
        assert_ne!(here, make(PREFIX, [1; 6]));
    }

    #[test]
    fn taken_address_is_avoided() {
        let first = address(Scheme::StablePrivacy, secret, PREFIX, MAC, TAKEN).unwrap();
        let second = address(Scheme::StablePrivacy, secret, PREFIX, MAC, first).unwrap();
        assert_ne!(first, second);
    }

    #[test]
    fn keyed_hash_is_siphash_2_4() {
        // Test vector of the SipHash paper, appendix A.
        #[allow(deprecated, reason = "as in `stable`")]
        let mut hasher =
            std::hash::SipHasher::new_with_keys(0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908);
        hasher.write(&(0..15).collect::<Vec<u8>>());
        assert_eq!(hasher.finish(), 0xa129_ca61_49be_45e5);
    }

    #[test]
    fn prefix_without_room_is_refused() {
        let full = (PREFIX.0, 128);
        for scheme in [Scheme::Eui64, Scheme::StablePrivacy] {
            let error = address(scheme, secret, full, MAC, TAKEN).expect_err("made");
            assert!(error.to_string().contains("/128"), "{error}");
        }
    }

    #[test]
    fn bad_secrets_are_refused() {
        for text in [
            "",
            "uninitialized",
            "+0112233445566778899aabbccddeeff",
            &"0".repeat(33),
        ] {
            assert!(Secret::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn neutral_address_avoids_what_is_taken() {
        let hoa = "fd5e:6d61:74::5".parse().unwrap();
        let scheme = Scheme::StablePrivacy;
        let make = |taken: &[Ipv6Addr]| {
            neutral_address(scheme, secret, PREFIX, MAC, hoa, |it| taken.contains(&it)).unwrap()
        };
        let first = make(&[]);
        assert_eq!(first, make(&[]));
        let second = make(&[first]);
        assert_ne!(second, first);
        assert!(![first, second].contains(&make(&[first, second])));
        let all = neutral_address(scheme, secret, PREFIX, MAC, hoa, |_| true);
        assert!(matches!(all, Err(IdentifierError::Prefix { .. })));
    }

    proptest! {
        #[test]
        fn neutral_address_is_neutral_and_in_the_prefix(
            bits: u128, length in 0_u8..=64, mac: [u8; 6], hoa: u128,
        ) {
            let host = u128::MAX >> length;
            let (prefix, hoa) = (Ipv6Addr::from_bits(bits & !host), Ipv6Addr::from_bits(hoa));
            for scheme in [Scheme::Eui64, Scheme::StablePrivacy] {
                let made = neutral_address(scheme, secret, (prefix, length), mac, hoa, |_| false);
                let made = made.unwrap();
                prop_assert_eq!(made.to_bits() & !host, prefix.to_bits());
                prop_assert!(common::mat::neutral::is_neutral(made.octets(), hoa.octets()));
            }
        }

        #[test]
        fn address_is_always_in_the_prefix(bits: u128, length in 0_u8..=64, mac: [u8; 6]) {
            let host = u128::MAX >> length;
            let prefix = Ipv6Addr::from_bits(bits & !host);
            for scheme in [Scheme::Eui64, Scheme::StablePrivacy] {
                let made = address(scheme, secret, (prefix, length), mac, TAKEN).unwrap();
                prop_assert_eq!(made.to_bits() & !host, prefix.to_bits());
            }
        }
    }
}
