//! A host with a bridge, guests on TAPs and the data path attached to them.

use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use aya::programs::{SchedClassifier, TcAttachType};
use common::maps::{BridgeNumber, FilterMode, LAYOUT_VERSION, Listener, ListenerKey, ManagedKey};
use roamcast::datapath::{BridgeLink, Datapath, DatapathConfig, Hook, Limits};
use roamcast::net::membership::Memberships;
use roamcast::proto::Membership;

use super::netns::wait_for;
use super::tap::Guest;

/// Limits of a port that no test reaches by accident.
pub const LIMITS: Limits = Limits {
    listeners: 2000,
    sources: 2000,
    reports_per_second: 1000,
    datagrams_per_second: 50,
    flows: 4096,
};

/// Returns the TC hook that an agent chooses on this kernel.
pub fn tc_hook() -> Hook {
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => Hook::Tcx,
        Err(_) => Hook::Filter,
    }
}

/// Returns the TC hooks that this kernel has, and prints a missing one.
pub fn tc_hooks() -> Vec<Hook> {
    if tc_hook() == Hook::Tcx {
        return vec![Hook::Tcx, Hook::Filter];
    }
    println!("by filters only: this kernel has no TCX");
    vec![Hook::Filter]
}

/// Returns true if this kernel has TCX; prints a message otherwise.
pub fn has_tcx() -> bool {
    let has_tcx = tc_hook() == Hook::Tcx;
    if !has_tcx {
        println!("skipped: this kernel has no TCX");
    }
    has_tcx
}

/// Returns the directory of this layout's pinned maps; links are in `links` below.
pub fn pins(config: &DatapathConfig) -> PathBuf {
    config.pin_root.join(format!("v{LAYOUT_VERSION}"))
}

/// Returns a routable multicast address by number.
pub fn group(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0x1234, number)
}

/// Returns a source address by number.
pub fn source(number: u16) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 9, 0, 0, 0, number)
}

/// Returns a membership in a numbered group with numbered sources.
pub fn membership(number: u16, filter_mode: FilterMode, sources: &[u16]) -> Membership {
    Membership {
        key: managed(number),
        filter_mode,
        sources: sources.iter().map(|&number| source(number)).collect(),
    }
}

/// Returns a membership in a numbered group that takes every source.
pub fn any_source(number: u16) -> Membership {
    membership(number, FilterMode::Exclude, &[])
}

/// Returns the key of a numbered group, untagged.
pub fn managed(number: u16) -> ManagedKey {
    ManagedKey {
        vlan: 0,
        bridge: BridgeNumber::FIRST,
        multicast_address: group(number).octets(),
    }
}

/// Returns the key of a guest's listener to a numbered group.
pub fn key(guest: &Guest, number: u16) -> ListenerKey {
    ListenerKey {
        ifindex: guest.ifindex,
        vlan: 0,
        bridge: BridgeNumber::FIRST,
        multicast_address: group(number).octets(),
    }
}

/// Returns the default configuration with pins below a BPF file system.
pub fn config(bpffs: &Path) -> DatapathConfig {
    DatapathConfig {
        pin_root: bpffs.join("roamcast"),
        // Every namespace has this interface; the programs need its number only.
        bridge: Some(BridgeLink {
            ifindex: 1,
            name: "lo".to_owned(),
        }),
        ..DatapathConfig::default()
    }
}

/// Makes a socket with real kernel listeners in a guest.
pub fn listeners(guest: &Guest) -> Memberships {
    let ifindex = guest.namespace.ifindex("eth0");
    guest.namespace.run(|| Memberships::new(ifindex))
}

/// Joins in the guest.
pub fn join(guest: &Guest, listeners: &mut Memberships, membership: &Membership) {
    guest
        .namespace
        .run(|| listeners.join(membership))
        .unwrap_or_else(|error| panic!("{error}"));
}

/// Waits until the map has a listener that satisfies a condition.
pub fn listener(
    datapath: &Datapath,
    key: &ListenerKey,
    wanted: impl Fn(&Listener) -> bool,
) -> Listener {
    wait_for(&format!("listener {key:?}"), || {
        datapath.listener(key).unwrap().filter(&wanted)
    })
}

/// Returns the current source list of a listener, sorted.
pub fn live_sources(datapath: &Datapath, key: &ListenerKey) -> Vec<Ipv6Addr> {
    let Some(listener) = datapath.listener(key).unwrap() else {
        return Vec::new();
    };
    let mut sources: Vec<Ipv6Addr> = datapath
        .sources()
        .unwrap()
        .into_iter()
        .filter(|(source, value)| {
            source.listener == *key && value.generation == listener.generation
        })
        .map(|(source, _)| Ipv6Addr::from(source.source))
        .collect();
    sources.sort_unstable();
    sources
}

/// Waits until a listener has exactly these sources.
pub fn wait_for_sources(datapath: &Datapath, key: &ListenerKey, numbers: &[u16]) {
    let wanted: Vec<Ipv6Addr> = numbers.iter().map(|&number| source(number)).collect();
    wait_for(&format!("sources {numbers:?}"), || {
        (live_sources(datapath, key) == wanted).then_some(())
    });
}
