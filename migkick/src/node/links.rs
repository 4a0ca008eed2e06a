//! The kernel's view of the NICs, over rtnetlink: usable NICs and addresses, changes,
//! announcements.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd};

use crate::interface::{self, Interface};
use linux::interface::{address_flags, ipv6_address};
use linux::netlink::bytes::messages;
use linux::netlink::{Group, Heard, Netlink, Notices, typed};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkEvent, LinkFlags};

/// Limit of messages per call, so that other inputs have their turn.
const MAX_BATCH: usize = 64;

/// An address on a NIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) ifindex: u32,
    pub(super) address: Ipv6Addr,
    /// Length of the prefix, bits.
    pub(super) length: u8,
    flags: AddressFlags,
}

impl Address {
    /// Whether duplicate address detection has succeeded and the address is permanent.
    pub(super) fn is_usable(&self) -> bool {
        let unusable = AddressFlags::Tentative
            | AddressFlags::Dadfailed
            | AddressFlags::Deprecated
            | AddressFlags::Secondary;
        !self.flags.intersects(unusable)
    }

    /// Whether duplicate address detection has found another node with the address.
    pub(super) fn is_double(&self) -> bool {
        self.flags.contains(AddressFlags::Dadfailed)
    }
}

/// Changes since the last call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// The kernel has announced the VM (NOTIFY_PEERS).
    pub(super) announced: bool,
    /// NICs or addresses have changed.
    pub(super) changed: bool,
}

/// rtnetlink sockets for notifications and requests.
pub(super) struct Links {
    events: Notices,
    netlink: Netlink,
}

impl Links {
    pub(super) fn open() -> io::Result<Self> {
        let events = Notices::open(&[Group::Link, Group::Ipv6Address])?;
        let netlink = Netlink::open()?;
        Ok(Self { events, netlink })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    pub(super) fn netlink(&mut self) -> &mut Netlink {
        &mut self.netlink
    }

    /// Reads all pending notifications.
    pub(super) fn take(&mut self) -> Changes {
        let mut changes = Changes::default();
        for _ in 0..MAX_BATCH {
            match self.events.try_next() {
                Ok(Some(Heard::Datagram(datagram))) => read(&datagram, &mut changes),
                Ok(None) => break,
                // The kernel has dropped notifications, so anything may have changed.
                Ok(Some(Heard::Lost)) | Err(_) => changes.changed = true,
            }
        }
        changes
    }

    /// Returns the NICs with a carrier, the most likely active one first.
    pub(super) fn interfaces(&mut self) -> io::Result<Vec<Interface>> {
        let interfaces = interface::list(&mut self.netlink)?;
        let links = self.netlink.links()?.into_iter();
        let running: BTreeSet<u32> = links
            .map(|link| link.header)
            .filter(|header| header.flags.contains(LinkFlags::Running))
            .map(|header| header.index)
            .collect();
        let running = |it: Interface| Interface {
            up: it.up && running.contains(&it.ifindex),
            ..it
        };
        Ok(interfaces.into_iter().map(running).collect())
    }

    /// Returns all global addresses.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let addresses = self.netlink.ipv6_addresses()?;
        Ok(addresses.iter().filter_map(address).collect())
    }
}

fn address(message: &AddressMessage) -> Option<Address> {
    let address =
        ipv6_address(message).filter(|it| !it.is_unicast_link_local() && !it.is_loopback())?;
    Some(Address {
        ifindex: message.header.index,
        address,
        length: message.header.prefix_len,
        flags: address_flags(message),
    })
}

fn read(datagram: &[u8], changes: &mut Changes) {
    // A notice that is not understood is one of a change, too.
    changes.changed |= !datagram.is_empty();
    for message in messages(datagram) {
        if let Some(RouteNetlinkMessage::NewLink(link)) = typed(message.bytes) {
            let announced = LinkAttribute::Event(LinkEvent::NotifyPeers);
            changes.announced |= link.attributes.contains(&announced);
        }
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::link::LinkMessage;

    use super::*;
    use crate::testing::{in_namespace, ip};
    use proptest::prelude::*;

    fn event(kind: LinkEvent) -> Vec<u8> {
        let mut link = LinkMessage::default();
        link.attributes.push(LinkAttribute::Event(kind));
        linux::netlink::serialized(RouteNetlinkMessage::NewLink(link), 0)
    }

    #[test]
    fn announcement_is_told_from_other_changes() {
        let mut changes = Changes::default();
        read(&event(LinkEvent::IgmpResend), &mut changes);
        assert_eq!((changes.announced, changes.changed), (false, true));
        let mut both = event(LinkEvent::None);
        both.extend(event(LinkEvent::NotifyPeers));
        read(&both, &mut changes);
        assert!(changes.announced);
    }

    proptest! {
        #[test]
        fn any_bytes_from_the_kernel_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            read(&bytes, &mut Changes::default());
        }
    }

    #[test]
    fn addresses_and_their_changes_are_seen() {
        in_namespace(|| {
            ip("link add nic0 type veth peer name other");
            let mut links = Links::open().unwrap();
            ip("link set nic0 up");
            ip("link set other up");
            ip("address add 2001:db8::5/64 dev nic0 nodad");
            assert!(links.take().changed);
            assert_eq!(links.take(), Changes::default());
            let addresses = links.addresses().unwrap();
            assert_eq!(addresses.len(), 1);
            assert!(addresses[0].is_usable());
            assert_eq!(addresses[0].length, 64);
            let up = |links: &mut Links| {
                let interfaces = links.interfaces().unwrap();
                interfaces.iter().find(|it| it.name == "nic0").unwrap().up
            };
            assert!(up(&mut links));
            ip("link set other down");
            assert!(!up(&mut links), "it has no carrier");
        });
    }
}
