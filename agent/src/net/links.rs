//! Ports of the managed bridge, watched through rtnetlink (`RTNLGRP_LINK`).
//!
//! ```text
//!            VM        VM          a port is a VM's when it is a TAP (`IFLA_INFO_KIND` "tun") or
//!            |         |           its name matches a configured pattern; it is an uplink when
//!          vnet0     vnet1         the config names it, or, where the config names none, when it
//!       .----+---------+----.      is any other port
//!       |        br0        |
//!       '---------+---------'
//!               eth0 (uplink)
//! ```
//!
//! The kernel drops notices when the reader is late (`ENOBUFS`). The agent then reads all links
//! again and compares them with the known ones, so no change is lost for good.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use common::maps::BridgeNumber;
use linux::interface;
use linux::netlink::bytes::messages;
use linux::netlink::{AsyncNotices, Group, Heard, Netlink, typed};
use netlink_packet_route::link::{InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::proto::{Port, PortEvent};

pub use netlink_packet_route::link::InfoBridge;

/// Receive buffer for notices, bytes; holds notices of several thousand links.
const RECEIVE_BUFFER_BYTES: u32 = 4 * 1024 * 1024;

/// Why the ports of the bridge cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum LinksError {
    /// No interface has that name.
    #[error("There is no interface {0}; create the bridge or correct the name in the config")]
    NoBridge(String),
    /// The interface is not a bridge.
    #[error("Interface {0} is not a bridge; name the bridge that the TAPs are ports of")]
    NotABridge(String),
    /// The bridge was deleted while the agent watched it.
    #[error("Bridge {0} was removed; create it again and restart the agent")]
    Removed(String),
    /// A netlink request failed.
    #[error("Cannot read the network interfaces: {0}; netlink must be permitted")]
    Netlink(#[from] io::Error),
}

/// Rules that classify the ports of the bridge.
#[derive(Clone, Debug, Default)]
pub struct PortRules {
    /// Name of the managed bridge.
    pub bridge: String,
    /// Number of the bridge, which each [`Port`] repeats.
    pub number: BridgeNumber,
    /// Names of the uplinks. Empty: every port that is not a VM's is an uplink.
    pub uplinks: Vec<String>,
    /// Names of ports that belong to VMs although they are no TAPs. A `*` at the end matches any
    /// suffix.
    pub vm_ports: Vec<String>,
}

/// A change of the bridge's ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkEvent {
    /// A change of a VM's port.
    Port(PortEvent),
    /// An uplink joined the bridge.
    UplinkAdded(Port),
    /// An uplink left the bridge or was deleted.
    UplinkRemoved {
        /// Index that the interface had.
        ifindex: u32,
    },
    /// A port that is neither a VM's nor an uplink joined the bridge.
    OtherAdded(Port),
    /// Such a port left the bridge or was deleted.
    OtherRemoved {
        /// Index that the interface had.
        ifindex: u32,
    },
    /// The events of all ports present at the start precede this event. Sent once.
    Complete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Vm,
    Uplink,
    /// A port that is neither a VM's nor a configured uplink.
    Other,
}

/// Watches the ports of a bridge.
pub struct Links {
    bridge_ifindex: u32,
    notices: AsyncNotices,
    table: PortTable,
    bridge_removed: bool,
}

impl Links {
    /// Starts to watch, in the network namespace of the calling thread. The first events are the
    /// ports present.
    ///
    /// # Errors
    ///
    /// See [`LinksError`].
    pub fn watch(rules: PortRules) -> Result<Self, LinksError> {
        // Subscribes before the dump, so that no change in between is missed.
        let notices = AsyncNotices::open(&[Group::Link])?;
        notices.set_room(RECEIVE_BUFFER_BYTES)?;
        let bridge_ifindex = bridge(&rules.bridge)?.ifindex;
        let mut links = Self {
            bridge_ifindex,
            notices,
            table: PortTable::new(rules, bridge_ifindex),
            bridge_removed: false,
        };
        links.table.replace(&Netlink::open()?.links()?);
        links.table.events.push_back(LinkEvent::Complete);
        Ok(links)
    }

    /// Returns the interface index of the bridge.
    pub fn bridge_ifindex(&self) -> u32 {
        self.bridge_ifindex
    }

    /// Waits for the next change. Cancel safe.
    ///
    /// # Errors
    ///
    /// See [`LinksError`]; nothing follows [`LinksError::Removed`].
    pub async fn next(&mut self) -> Result<LinkEvent, LinksError> {
        loop {
            if let Some(event) = self.table.events.pop_front() {
                return Ok(event);
            }
            if self.bridge_removed {
                return Err(LinksError::Removed(self.table.rules.bridge.clone()));
            }
            match self.notices.next().await? {
                Heard::Datagram(datagram) => self.take(&datagram),
                Heard::Lost => self.resync()?,
            }
        }
    }

    fn take(&mut self, datagram: &[u8]) {
        for message in messages(datagram) {
            match typed(message.bytes) {
                Some(RouteNetlinkMessage::NewLink(link)) => self.table.set(&link),
                Some(RouteNetlinkMessage::DelLink(link))
                    // The kernel announces a port that leaves its bridge as deleted in this family.
                    if link.header.interface_family != AddressFamily::Bridge =>
                {
                    if link.header.index == self.bridge_ifindex {
                        self.bridge_removed = true;
                    }
                    self.table.remove(link.header.index);
                }
                Some(_) => {}
                None => tracing::debug!(kind = message.kind, "link notice not understood"),
            }
        }
    }

    /// Reads all links again. Discards the waiting notices first, because they are older than the
    /// dump.
    fn resync(&mut self) -> Result<(), LinksError> {
        tracing::info!("link notices were lost, reading all links again");
        while self.notices.try_next()?.is_some() {}
        let links = Netlink::open()?.links()?;
        self.bridge_removed = !links
            .iter()
            .any(|link| link.header.index == self.bridge_ifindex);
        self.table.replace(&links);
        Ok(())
    }
}

/// A bridge with its settings.
#[derive(Clone, Debug)]
pub struct Bridge {
    /// Index of the bridge in the network namespace.
    pub ifindex: u32,
    /// Attributes of `IFLA_INFO_DATA`, in the kernel's order.
    pub settings: Vec<InfoBridge>,
}

/// Finds a bridge by name, in the network namespace of the calling thread.
///
/// # Errors
///
/// See [`LinksError`].
pub fn bridge(name: &str) -> Result<Bridge, LinksError> {
    let links = Netlink::open()?.links()?;
    let link = links
        .iter()
        .find(|link| interface::name(link) == Some(name))
        .ok_or_else(|| LinksError::NoBridge(name.to_owned()))?;
    if interface::kind(link) != Some(&InfoKind::Bridge) {
        return Err(LinksError::NotABridge(name.to_owned()));
    }
    let settings = interface::info(link)
        .find_map(|info| match info {
            LinkInfo::Data(InfoData::Bridge(settings)) => Some(settings.clone()),
            _ => None,
        })
        .unwrap_or_default();
    Ok(Bridge {
        ifindex: link.header.index,
        settings,
    })
}

/// The known ports, and the events of their changes that wait to be returned.
struct PortTable {
    rules: PortRules,
    bridge_ifindex: u32,
    ports: BTreeMap<u32, (Role, Port)>,
    events: VecDeque<LinkEvent>,
}

impl PortTable {
    fn new(rules: PortRules, bridge_ifindex: u32) -> Self {
        Self {
            rules,
            bridge_ifindex,
            ports: BTreeMap::new(),
            events: VecDeque::new(),
        }
    }

    fn role(&self, name: &str, tap: bool) -> Role {
        let uplinks = &self.rules.uplinks;
        if uplinks.iter().any(|uplink| uplink == name) {
            Role::Uplink
        } else if tap || self.rules.vm_ports.iter().any(|p| matches(p, name)) {
            Role::Vm
        } else if uplinks.is_empty() {
            Role::Uplink
        } else {
            Role::Other
        }
    }

    fn set(&mut self, link: &LinkMessage) {
        // Messages of this family describe a link only as a port, without its kind.
        if link.header.interface_family == AddressFamily::Bridge {
            return;
        }
        let Some(name) = interface::name(link) else {
            return;
        };
        let ours = link.attributes.iter().any(|attribute| {
            matches!(attribute, LinkAttribute::Controller(index) if *index == self.bridge_ifindex)
        });
        let tap = interface::kind(link) == Some(&InfoKind::Tun);
        let ifindex = link.header.index;
        let role = ours.then(|| self.role(name, tap));
        let Some(role) = role else {
            self.remove(ifindex);
            return;
        };
        let port = Port {
            bridge: self.rules.number,
            ifindex,
            name: name.to_owned(),
            mac: interface::mac(link).unwrap_or_default(),
        };
        match self.ports.get(&ifindex) {
            Some((known_role, known)) if *known_role == role && *known == port => return,
            Some((known_role, _)) if *known_role != role => self.remove(ifindex),
            _ => {}
        }
        self.ports.insert(ifindex, (role, port.clone()));
        self.events.push_back(match role {
            Role::Vm => LinkEvent::Port(PortEvent::Added(port)),
            Role::Uplink => LinkEvent::UplinkAdded(port),
            Role::Other => LinkEvent::OtherAdded(port),
        });
    }

    fn remove(&mut self, ifindex: u32) {
        if let Some((role, _)) = self.ports.remove(&ifindex) {
            self.events.push_back(match role {
                Role::Vm => LinkEvent::Port(PortEvent::Removed { ifindex }),
                Role::Uplink => LinkEvent::UplinkRemoved { ifindex },
                Role::Other => LinkEvent::OtherRemoved { ifindex },
            });
        }
    }

    /// Applies a complete dump: removes the ports that the dump lacks.
    fn replace(&mut self, links: &[LinkMessage]) {
        let gone: Vec<u32> = self
            .ports
            .keys()
            .filter(|&&ifindex| !links.iter().any(|link| link.header.index == ifindex))
            .copied()
            .collect();
        for ifindex in gone {
            self.remove(ifindex);
        }
        for link in links {
            self.set(link);
        }
    }
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIDGE: u32 = 5;

    fn link(index: u32, name: &str, controller: Option<u32>, kind: InfoKind) -> LinkMessage {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Address(vec![0xfe, 0x54, 0, 0, 0, 1]),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]),
        ];
        link.attributes
            .extend(controller.map(LinkAttribute::Controller));
        link
    }

    fn table(uplinks: &[&str]) -> PortTable {
        let rules = PortRules {
            bridge: "br0".to_owned(),
            number: BridgeNumber::FIRST,
            uplinks: uplinks.iter().map(|&name| name.to_owned()).collect(),
            vm_ports: vec!["vm-*".to_owned()],
        };
        PortTable::new(rules, BRIDGE)
    }

    fn port(ifindex: u32, name: &str) -> Port {
        Port {
            bridge: BridgeNumber::FIRST,
            ifindex,
            name: name.to_owned(),
            mac: [0xfe, 0x54, 0, 0, 0, 1],
        }
    }

    #[test]
    fn a_tap_is_a_vms_and_any_other_port_an_uplink() {
        let mut table = table(&[]);
        table.set(&link(7, "vnet0", Some(BRIDGE), InfoKind::Tun));
        table.set(&link(8, "eth0", Some(BRIDGE), InfoKind::Veth));
        table.set(&link(9, "vm-3", Some(BRIDGE), InfoKind::Veth));
        table.set(&link(10, "tap9", Some(BRIDGE + 1), InfoKind::Tun));
        let events: Vec<_> = table.events.into_iter().collect();
        assert_eq!(
            events,
            [
                LinkEvent::Port(PortEvent::Added(port(7, "vnet0"))),
                LinkEvent::UplinkAdded(port(8, "eth0")),
                LinkEvent::Port(PortEvent::Added(port(9, "vm-3"))),
            ]
        );
    }

    #[test]
    fn named_uplinks_leave_other_ports_alone() {
        let mut table = table(&["eth0"]);
        table.set(&link(8, "eth0", Some(BRIDGE), InfoKind::Veth));
        table.set(&link(9, "eth1", Some(BRIDGE), InfoKind::Veth));
        let others = LinkEvent::OtherAdded(port(9, "eth1"));
        assert_eq!(
            table.events,
            [LinkEvent::UplinkAdded(port(8, "eth0")), others]
        );
    }

    #[test]
    fn a_port_that_leaves_the_bridge_is_removed_once() {
        let mut table = table(&[]);
        table.set(&link(7, "vnet0", Some(BRIDGE), InfoKind::Tun));
        table.set(&link(7, "vnet0", Some(BRIDGE), InfoKind::Tun));
        table.set(&link(7, "vnet0", None, InfoKind::Tun));
        table.remove(7);
        let events: Vec<_> = table.events.into_iter().skip(1).collect();
        assert_eq!(events, [LinkEvent::Port(PortEvent::Removed { ifindex: 7 })]);
    }

    #[test]
    fn a_new_dump_tells_what_came_and_went_meanwhile() {
        let mut table = table(&[]);
        table.set(&link(7, "vnet0", Some(BRIDGE), InfoKind::Tun));
        table.events.clear();
        table.replace(&[link(8, "vnet1", Some(BRIDGE), InfoKind::Tun)]);
        assert_eq!(
            table.events,
            [
                LinkEvent::Port(PortEvent::Removed { ifindex: 7 }),
                LinkEvent::Port(PortEvent::Added(port(8, "vnet1"))),
            ]
        );
    }
}
