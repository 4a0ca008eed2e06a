//! IPv6 addresses of the bridge: the prefix in which an arriving VM gets its address, and the
//! link-local address by which the VMs know the agent.

use std::io;
use std::net::Ipv6Addr;

use linux::interface;
use linux::netlink::Netlink;
use netlink_packet_route::address::{AddressFlags, AddressMessage, AddressScope};

/// Why the addresses of an interface cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum AddressesError {
    /// No interface has that name.
    #[error("There is no interface {0}; create it or correct the name in the config")]
    NoInterface(String),
    /// A netlink request failed.
    #[error("Cannot read the addresses of {interface}: {error}; netlink must be permitted")]
    Netlink {
        /// Name of the interface as configured.
        interface: String,
        /// Error of the netlink socket.
        #[source]
        error: io::Error,
    },
}

/// Usable IPv6 addresses of one interface: neither tentative nor failed (duplicate).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Index of the interface in the network namespace.
    pub ifindex: u32,
    /// First link-local address; `None` until duplicate address detection is over.
    pub link_local: Option<Ipv6Addr>,
    /// Global address and its prefix length in bits. A permanent address is preferred over an
    /// autoconfigured one; a temporary or deprecated one is never used.
    pub global: Option<(Ipv6Addr, u8)>,
}

impl Addresses {
    /// Returns the prefix of the global address (host bits zero) and its length.
    pub fn prefix(&self) -> Option<(Ipv6Addr, u8)> {
        self.global.map(|(address, length)| {
            let mask = u128::MAX
                .checked_shl(128 - u32::from(length.min(128)))
                .unwrap_or(0);
            (Ipv6Addr::from_bits(address.to_bits() & mask), length)
        })
    }
}

/// Reads the addresses of an interface, in the network namespace of the calling thread.
///
/// # Errors
///
/// See [`AddressesError`]; an interface without addresses is no error.
pub fn addresses(interface: &str) -> Result<Addresses, AddressesError> {
    let ifindex = nix::net::if_::if_nametoindex(interface)
        .map_err(|_| AddressesError::NoInterface(interface.to_owned()))?;
    let messages = Netlink::open()
        .and_then(|mut netlink| netlink.ipv6_addresses())
        .map_err(|error| AddressesError::Netlink {
            interface: interface.to_owned(),
            error,
        })?;
    let own = messages.iter().filter(|it| it.header.index == ifindex);
    Ok(choose(ifindex, own))
}

fn choose<'a>(ifindex: u32, messages: impl Iterator<Item = &'a AddressMessage>) -> Addresses {
    let mut chosen = Addresses {
        ifindex,
        link_local: None,
        global: None,
    };
    let mut best_rank = None;
    for message in messages {
        let flags = interface::address_flags(message);
        let address = interface::ipv6_address(message);
        // The kernel lists multicast addresses with `IFA_F_MCAUTOJOIN` here; those are joins, not
        // addresses of the host.
        let Some(address) = address.filter(|address| !address.is_multicast()) else {
            continue;
        };
        if flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed) {
            continue;
        }
        match message.header.scope {
            AddressScope::Link => {
                chosen.link_local.get_or_insert(address);
            }
            AddressScope::Universe
                if !flags.intersects(AddressFlags::Deprecated | AddressFlags::Secondary) =>
            {
                let rank = u8::from(flags.contains(AddressFlags::Permanent));
                if best_rank < Some(rank) {
                    best_rank = Some(rank);
                    chosen.global = Some((address, message.header.prefix_len));
                }
            }
            _ => {}
        }
    }
    chosen
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use netlink_packet_route::address::AddressAttribute;

    use super::*;

    fn message(
        address: &str,
        length: u8,
        scope: AddressScope,
        flags: AddressFlags,
    ) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.prefix_len = length;
        message.header.scope = scope;
        message.attributes = vec![
            AddressAttribute::Address(IpAddr::V6(address.parse().unwrap())),
            AddressAttribute::Flags(flags),
        ];
        message
    }

    #[test]
    fn a_permanent_global_address_goes_before_a_learnt_one() {
        let messages = [
            message("fe80::1", 64, AddressScope::Link, AddressFlags::Permanent),
            message(
                "2001:db8:1::5",
                64,
                AddressScope::Universe,
                AddressFlags::Managetempaddr,
            ),
            message(
                "2001:db8:2::6",
                48,
                AddressScope::Universe,
                AddressFlags::Permanent,
            ),
            message(
                "2001:db8:3::7",
                64,
                AddressScope::Universe,
                AddressFlags::Permanent,
            ),
        ];
        let chosen = choose(3, messages.iter());
        assert_eq!(chosen.link_local, Some("fe80::1".parse().unwrap()));
        assert_eq!(chosen.global, Some(("2001:db8:2::6".parse().unwrap(), 48)));
        assert_eq!(chosen.prefix(), Some(("2001:db8:2::".parse().unwrap(), 48)));
    }

    #[test]
    fn tentative_temporary_and_deprecated_addresses_are_not_taken() {
        let messages = [
            message("fe80::1", 64, AddressScope::Link, AddressFlags::Tentative),
            message(
                "2001:db8::1",
                64,
                AddressScope::Universe,
                AddressFlags::Deprecated,
            ),
            message(
                "2001:db8::2",
                64,
                AddressScope::Universe,
                AddressFlags::Secondary,
            ),
            message(
                "2001:db8::3",
                64,
                AddressScope::Universe,
                AddressFlags::Dadfailed,
            ),
        ];
        let chosen = choose(3, messages.iter());
        assert_eq!((chosen.link_local, chosen.global), (None, None));
        assert_eq!(chosen.prefix(), None);
    }

    #[test]
    fn a_prefix_of_any_length_is_cut_out() {
        for (length, prefix) in [(0, "::"), (128, "2001:db8::1"), (127, "2001:db8::")] {
            let addresses = Addresses {
                ifindex: 1,
                link_local: None,
                global: Some(("2001:db8::1".parse().unwrap(), length)),
            };
            assert_eq!(addresses.prefix(), Some((prefix.parse().unwrap(), length)));
        }
    }
}
