//! A neighbour invents flows: each packet uses another source port.

use std::time::Duration;

use common::counter::Counter;
use common::maps::{BridgeNumber, DeliveredKey, ManagedKey, Origins, StreamKey};
use common::testing::frame::{Frame, address};
use roamcast::clock::now;
use roamcast::datapath::{Capacities, DatapathConfig};
use support::bridged::{Bridged, GROUP, SOURCE};
use support::host::{LIMITS, config};
use support::netns::{privileged, wait_for};
use support::tap;

use super::count;

const OTHER_GROUP: &str = "ff3e:1::4321";
/// More flows than either map holds.
const MADE_UP: u16 = 9000;
const HOUR: Duration = Duration::from_secs(3600);

fn frame(group: &str, source_port: u16) -> Vec<u8> {
    Frame::udp(SOURCE, group, (source_port, 5004), b"made up").bytes()
}

fn stream(group: &str, source_port: u16) -> StreamKey {
    StreamKey {
        multicast_address: address(group),
        source: address(SOURCE),
        source_port,
        destination_port: 5004,
        vlan: 0,
        bridge: BridgeNumber::FIRST,
    }
}

#[test]
fn flows_made_up_for_one_address_and_vm_take_no_room_of_another_and_go_soon() {
    if !privileged() {
        return;
    }
    let setup = Bridged::new();
    let uplink = setup.host.ifindex("up0");
    let _other_tap = setup.host.run(|| tap::open("vnet1"));
    setup.host.ip("link set vnet1 master br0 up");
    setup.host.bridge("link set dev vnet1 mcast_flood off");
    let other = setup.host.ifindex("vnet1");
    setup.host.run_with_bpffs(|bpffs| {
        let datapath = setup.attach(&DatapathConfig {
            capacities: Capacities {
                streams: 4096,
                delivered: 8192,
                ..Capacities::default()
            },
            ..config(bpffs)
        });
        datapath.attach_uplink(uplink, "up0").unwrap();
        datapath.attach_port(other, "vnet1", &LIMITS).unwrap();
        for group in [GROUP, OTHER_GROUP] {
            let key = ManagedKey {
                vlan: 0,
                bridge: BridgeNumber::FIRST,
                multicast_address: address(group),
            };
            datapath.manage(&key, now(), Origins::Native).unwrap();
        }
        for port in 1..=MADE_UP {
            setup.sender.send(&frame(GROUP, port));
        }
        setup.host.bridge("link set dev vnet1 mcast_flood on");
        setup.sender.send(&frame(OTHER_GROUP, 5004));
        let known = || -> Vec<StreamKey> {
            let streams = datapath.all_streams().unwrap();
            streams.into_iter().map(|(key, _)| key).collect()
        };
        wait_for("the stream of another address", || {
            known().contains(&stream(OTHER_GROUP, 5004)).then_some(())
        });
        let key = DeliveredKey {
            ifindex: other,
            stream: stream(OTHER_GROUP, 5004),
        };
        wait_for("the stream into another VM", || {
            datapath.delivered_of(&key).unwrap().map(drop)
        });
        for full in [Counter::StreamsFull, Counter::DeliveredFull] {
            assert_eq!(count(&datapath, full), 0, "{full:?}");
        }
        for full in [Counter::AddressFlowsFull, Counter::PortFlowsFull] {
            assert!(count(&datapath, full) > 4000, "{full:?}");
        }

        // A new flow finds room, and the invented ones are gone.
        datapath.collect(now() + HOUR / 2, HOUR).unwrap();
        datapath.collect(now() + HOUR / 2, HOUR).unwrap();
        assert_eq!(known(), [stream(OTHER_GROUP, 5004)]);
        assert_eq!(datapath.delivered(Some(setup.ifindex)).unwrap(), []);
        setup.sender.send(&frame(GROUP, 60_000));
        wait_for("a new stream of the same address", || {
            known().contains(&stream(GROUP, 60_000)).then_some(())
        });
    });
}
