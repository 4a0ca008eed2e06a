//! One routing table per NIC, with the routes of that NIC only.
//!
//! A packet that leaves by one NIC must not use the next hop of another NIC. A look-up for a given
//! NIC only prefers that NIC among routes with the same metric. Each NIC therefore gets a table
//! with copies of its own routes in the main table, and a rule that sends look-ups for the NIC to
//! that table first. If the table has no route, the main table answers as before.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv6Addr;

use common::mat::maps::FIRST_TABLE;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop,
    RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use linux::interface::Interface;
use linux::netlink::Netlink;

/// Priority of the rules: before the main table, whose rule has 32766.
const PRIORITY: u32 = 7400;
const PROTOCOL: RouteProtocol = RouteProtocol::Other(74);

/// Returns routes of the network to which a NIC is about to move; the main table does not have them
/// yet.
pub(super) fn of_network(
    nic: &Interface,
    (address, length): (Ipv6Addr, u8),
    router: Option<Ipv6Addr>,
) -> Vec<RouteMessage> {
    let host = u128::MAX.checked_shr(length.into()).unwrap_or(0);
    let prefix = Ipv6Addr::from_bits(address.to_bits() & !host);
    let route = |length, metric, attribute| {
        let mut route = RouteMessage::default();
        route.header.address_family = AddressFamily::Inet6;
        route.header.destination_prefix_length = length;
        route.header.scope = RouteScope::Universe;
        route.header.kind = RouteType::Unicast;
        route.attributes = vec![
            RouteAttribute::Oif(nic.ifindex),
            RouteAttribute::Priority(metric),
            attribute,
        ];
        route
    };
    // The metrics that the kernel gives such routes.
    let prefix = RouteAttribute::Destination(RouteAddress::Inet6(prefix));
    let mut routes = vec![route(length, 256, prefix)];
    if let Some(router) = router {
        let router = RouteAttribute::Gateway(RouteAddress::Inet6(router));
        routes.push(route(0, 1024, router));
    }
    routes
}

/// Updates the tables of the NICs from the main table and the planned routes.
pub(super) fn follow(
    netlink: &mut Netlink,
    nics: &[Interface],
    planned: &[RouteMessage],
) -> io::Result<()> {
    let routes = dump(netlink)?;
    for nic in nics {
        let table = FIRST_TABLE + nic.ifindex;
        let mut wanted = of_nic(&routes, nic.ifindex);
        wanted.extend(planned.iter().filter(|it| leaves_by(it, nic)).cloned());
        // Routes without a gateway first: the kernel accepts a gateway only on a known link.
        wanted.sort_by_key(|route| gateway(route).is_some());
        let mut keys = BTreeSet::new();
        wanted.retain(|route| keys.insert(key(route)));
        for route in wanted {
            let message = RouteNetlinkMessage::NewRoute(into_table(route, table));
            netlink.change(message, NLM_F_CREATE | NLM_F_REPLACE)?;
        }
        for route in routes.iter().filter(|it| table_of(it) == table) {
            if !keys.contains(&key(route)) {
                netlink.change(RouteNetlinkMessage::DelRoute(route.clone()), 0)?;
            }
        }
        let added = netlink.change(
            RouteNetlinkMessage::NewRule(rule(&nic.name, table)),
            NLM_F_CREATE | NLM_F_EXCL,
        );
        match added {
            Err(error) if !error.is_one_of(&[libc::EEXIST]) => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

/// Whether the output interface of a route is this NIC.
pub(super) fn leaves_by(route: &RouteMessage, nic: &Interface) -> bool {
    route.attributes.contains(&RouteAttribute::Oif(nic.ifindex))
}

/// Removes the rule and the table of a NIC.
pub(super) fn forget(netlink: &mut Netlink, nic: &Interface) -> io::Result<()> {
    let table = FIRST_TABLE + nic.ifindex;
    let removed = netlink.change(RouteNetlinkMessage::DelRule(rule(&nic.name, table)), 0);
    match removed {
        Err(error) if !error.is_one_of(&[libc::ENOENT]) => return Err(error.into()),
        _ => {}
    }
    for route in dump(netlink)? {
        if table_of(&route) == table {
            netlink.change(RouteNetlinkMessage::DelRoute(route), 0)?;
        }
    }
    Ok(())
}

fn dump(netlink: &mut Netlink) -> io::Result<Vec<RouteMessage>> {
    let mut routes = netlink.ipv6_routes()?;
    routes.retain(|route| route.header.kind == RouteType::Unicast);
    Ok(routes)
}

/// Returns the main table's routes that leave by a NIC, with one next hop each.
fn of_nic(routes: &[RouteMessage], ifindex: u32) -> Vec<RouteMessage> {
    let mut own = Vec::new();
    for route in routes {
        if table_of(route) != u32::from(RouteHeader::RT_TABLE_MAIN) {
            continue;
        }
        if route.attributes.contains(&RouteAttribute::Oif(ifindex)) {
            own.push(route.clone());
        }
        for attribute in &route.attributes {
            if let RouteAttribute::MultiPath(hops) = attribute {
                let hops = hops.iter().filter(|hop| hop.interface_index == ifindex);
                own.extend(hops.map(|hop| by_hop(route, hop)));
            }
        }
    }
    own
}

fn by_hop(route: &RouteMessage, hop: &RouteNextHop) -> RouteMessage {
    let mut route = route.clone();
    route
        .attributes
        .retain(|it| !matches!(it, RouteAttribute::MultiPath(_)));
    route
        .attributes
        .push(RouteAttribute::Oif(hop.interface_index));
    let gateway = hop
        .attributes
        .iter()
        .find(|it| matches!(it, RouteAttribute::Gateway(_)));
    route.attributes.extend(gateway.cloned());
    route
}

/// Copies a route to another table. The copy has no expiry; the next `follow` removes it after the
/// original is gone.
fn into_table(mut route: RouteMessage, table: u32) -> RouteMessage {
    route.header.table = RouteHeader::RT_TABLE_UNSPEC;
    route.header.protocol = PROTOCOL;
    route.header.flags = RouteFlags::empty();
    route.attributes.retain(|it| {
        matches!(
            it,
            RouteAttribute::Destination(_)
                | RouteAttribute::Gateway(_)
                | RouteAttribute::Oif(_)
                | RouteAttribute::Priority(_)
                | RouteAttribute::Metrics(_)
                | RouteAttribute::Preference(_)
        )
    });
    route.attributes.push(RouteAttribute::Table(table));
    route
}

fn rule(name: &str, table: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet6;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Oifname(name.to_owned()),
        RuleAttribute::Table(table),
        RuleAttribute::Priority(PRIORITY),
    ];
    rule
}

fn table_of(route: &RouteMessage) -> u32 {
    route
        .attributes
        .iter()
        .find_map(|it| match it {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or_else(|| route.header.table.into())
}

fn gateway(route: &RouteMessage) -> Option<&RouteAttribute> {
    route
        .attributes
        .iter()
        .find(|it| matches!(it, RouteAttribute::Gateway(_)))
}

/// Identity of a route within a table: destination and metric.
fn key(route: &RouteMessage) -> (u8, Option<Ipv6Addr>, u32) {
    let mut destination = None;
    let mut metric = 0;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                destination = Some(*address);
            }
            RouteAttribute::Priority(priority) => metric = *priority,
            _ => {}
        }
    }
    (route.header.destination_prefix_length, destination, metric)
}
