//! Tests of [`super`].

use super::*;

const ADDRESS: Ipv6Addr = Ipv6Addr::new(0xff3e, 0, 0, 0, 0, 0, 0, 1);
const SOURCE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x10);
const OTHER_SOURCE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x11);
const FLOW: Flow = Flow {
    source: SOURCE,
    multicast_address: ADDRESS,
};
const MS: u64 = 1_000_000;
const NOWHERE: Vec<SiteIndex> = Vec::new();

fn any_source(port: u32, present: bool) -> Change {
    Change {
        port,
        multicast_address: ADDRESS,
        source: None,
        blocked: false,
        include: false,
        present,
    }
}

fn routes(tree: &mut Tree) -> Vec<Vec<SiteIndex>> {
    std::iter::from_fn(|| tree.poll_action())
        .filter_map(|action| match action {
            Action::SetRoute { sites, .. } => Some(sites),
            Action::Log(_) => None,
        })
        .collect()
}

#[test]
fn flow_without_listener_gets_an_empty_route() {
    let mut tree = Tree::new(&[Site::Multicast; 2]);
    tree.handle_flow(FLOW, 0, 0);
    assert_eq!(routes(&mut tree), [NOWHERE]);
}

#[test]
fn branch_grows_with_the_first_listener_and_goes_with_the_last() {
    let mut tree = Tree::new(&[Site::Multicast; 2]);
    tree.handle_flow(FLOW, 0, 0);
    tree.handle_change(1, &any_source(7, true), MS);
    tree.handle_change(1, &any_source(8, true), MS);
    tree.handle_change(1, &any_source(7, false), MS);
    assert_eq!(routes(&mut tree), [NOWHERE, vec![1]]);
    tree.handle_change(1, &any_source(8, false), MS);
    assert_eq!(routes(&mut tree), [NOWHERE]);
    assert!(tree.branches(1).is_empty());
}

#[test]
fn late_site_waits_for_its_delay() {
    let mut tree = Tree::new(&[Site::Multicast, Site::Late(500)]);
    tree.handle_flow(FLOW, 0, 0);
    tree.handle_change(1, &any_source(7, true), 100 * MS);
    assert_eq!(tree.poll_timeout(), Some(600 * MS));
    tree.handle_timeout(600 * MS - 1);
    assert_eq!(routes(&mut tree), [NOWHERE]);
    tree.handle_timeout(600 * MS);
    assert_eq!(routes(&mut tree), [vec![1]]);
}

#[test]
fn late_site_starts_again_after_a_leave() {
    let mut tree = Tree::new(&[Site::Late(500), Site::Multicast]);
    tree.handle_flow(FLOW, 0, 0);
    tree.handle_change(0, &any_source(7, true), 0);
    tree.handle_change(0, &any_source(7, false), 200 * MS);
    tree.handle_change(0, &any_source(7, true), 400 * MS);
    tree.handle_timeout(500 * MS);
    assert_eq!(routes(&mut tree), [NOWHERE]);
    tree.handle_timeout(900 * MS);
    assert_eq!(routes(&mut tree), [vec![0]]);
}

#[test]
fn unicast_only_site_gets_nothing_until_it_becomes_multicast() {
    let mut tree = Tree::new(&[Site::Multicast, Site::UnicastOnly]);
    tree.handle_flow(FLOW, 0, 0);
    tree.handle_change(1, &any_source(7, true), 0);
    assert_eq!(tree.poll_timeout(), None);
    assert_eq!(routes(&mut tree), [NOWHERE]);
    tree.handle_site(1, Site::Multicast, MS);
    assert_eq!(routes(&mut tree), [vec![1]]);
    tree.handle_site(1, Site::UnicastOnly, 2 * MS);
    assert_eq!(routes(&mut tree), [NOWHERE]);
}

#[test]
fn include_listener_gets_only_its_sources() {
    let mut tree = Tree::new(&[Site::Multicast; 2]);
    tree.handle_flow(FLOW, 0, 0);
    tree.handle_flow(
        Flow {
            source: OTHER_SOURCE,
            ..FLOW
        },
        0,
        0,
    );
    routes(&mut tree);
    tree.handle_change(
        1,
        &Change {
            include: true,
            ..any_source(7, true)
        },
        0,
    );
    tree.handle_change(
        1,
        &Change {
            source: Some(SOURCE),
            ..any_source(7, true)
        },
        0,
    );
    let flows = tree.flows();
    assert_eq!(
        flows,
        [
            (FLOW, vec![1]),
            (
                Flow {
                    source: OTHER_SOURCE,
                    ..FLOW
                },
                NOWHERE
            ),
        ]
    );
}

#[test]
fn exclude_listener_does_not_get_a_blocked_source() {
    let mut tree = Tree::new(&[Site::Multicast; 2]);
    tree.handle_flow(FLOW, 0, 0);
    tree.handle_flow(
        Flow {
            source: OTHER_SOURCE,
            ..FLOW
        },
        0,
        0,
    );
    tree.handle_change(1, &any_source(7, true), 0);
    let blocked = Change {
        source: Some(SOURCE),
        blocked: true,
        ..any_source(7, true)
    };
    tree.handle_change(1, &blocked, 0);
    assert_eq!(
        tree.flows(),
        [
            (FLOW, NOWHERE),
            (
                Flow {
                    source: OTHER_SOURCE,
                    ..FLOW
                },
                vec![1]
            ),
        ]
    );
}

#[test]
fn dump_replaces_what_was_known() {
    let mut tree = Tree::new(&[Site::Multicast; 2]);
    tree.handle_flow(FLOW, 0, 0);
    tree.handle_change(0, &any_source(7, true), 0);
    tree.handle_dump(0, &[], 0);
    assert!(tree.branches(0).is_empty());
    tree.handle_dump(0, &[any_source(9, true)], 0);
    assert_eq!(tree.branches(0), [(ADDRESS, true)]);
    assert_eq!(routes(&mut tree).last(), Some(&vec![0]));
}

#[test]
fn flow_never_returns_to_its_own_site() {
    let mut tree = Tree::new(&[Site::Multicast; 2]);
    tree.handle_change(0, &any_source(7, true), 0);
    tree.handle_change(1, &any_source(7, true), 0);
    tree.handle_flow(FLOW, 1, 0);
    assert_eq!(routes(&mut tree), [vec![1]]);
}
