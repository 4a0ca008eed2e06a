//! Random events. The fixture checks after each event that nothing leaks.

use std::time::Duration;

use common::maps::{FilterMode, NO_BRIDGE};
use common::relay::{FIRST_PORT, FIRST_RELAY_PORT};
use proptest::prelude::*;

use super::fixture::*;
use crate::proto::relay::ports::PortTable;

#[derive(Clone, Debug)]
enum Event {
    Ask {
        agent: u16,
        group: u16,
        transaction: u64,
        include: Option<u16>,
        named: Option<u16>,
    },
    Release {
        agent: u16,
        transaction: u64,
    },
    Packet {
        group: u16,
        source: u16,
        port: u16,
    },
    Read,
    Wait(u64),
    Restart,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1..4_u16, 1..4_u16, 1..4_u64, prop::option::of(1..3_u16), prop::option::of(1..4_u16))
            .prop_map(|(agent, group, transaction, include, named)| Event::Ask {
                agent, group, transaction, include, named,
            }),
        1 => (1..4_u16, 1..4_u64)
            .prop_map(|(agent, transaction)| Event::Release { agent, transaction }),
        4 => (1..4_u16, 1..3_u16, 1..6_u16)
            .prop_map(|(group, source, port)| Event::Packet { group, source, port }),
        1 => Just(Event::Read),
        2 => (1..40_u64).prop_map(Event::Wait),
        1 => Just(Event::Restart),
    ]
}

fn apply(bench: &mut Bench, event: &Event) {
    match *event {
        Event::Ask {
            agent,
            group: number,
            transaction,
            include,
            named,
        } => {
            let mut asked = request(group(number), agent_address(agent));
            if let Some(from) = include {
                asked.filter_mode = FilterMode::Include as u8;
                asked.sources = vec![source(from).octets().into()];
            }
            asked.flows = named
                .map(|port| known(&stream(group(number), source(1), port)))
                .into_iter()
                .collect();
            bench.ask(&format!("vms{agent}"), transaction, &asked);
        }
        Event::Release { agent, transaction } => {
            bench.release(&format!("vms{agent}"), transaction);
        }
        Event::Packet {
            group: number,
            source: from,
            port,
        } => bench.packet(&stream(group(number), source(from), port)),
        Event::Read => bench.read(&[]),
        Event::Wait(seconds) => bench.wait(Duration::from_secs(seconds)),
        Event::Restart => {
            let mut config = config();
            config.limits.flows_per_session = 3;
            config.flow_silence = Duration::from_secs(60);
            bench.restart_with(config);
        }
    }
}

proptest! {
    #[test]
    fn nothing_leaks_whatever_happens(events in prop::collection::vec(event(), 1..80)) {
        let mut config = config();
        config.limits.flows_per_session = 3;
        config.flow_silence = Duration::from_secs(60);
        let mut bench = Bench::with(config);
        for event in &events {
            apply(&mut bench, event);
        }
        bench.wait(HELD);
        prop_assert_eq!(bench.relay.sessions().count(), 0);
        prop_assert!(bench.kernel.subscribers.is_empty());
        prop_assert!(bench.kernel.joined.is_empty());
        prop_assert_eq!(bench.relay.poll_timeout(), None);
    }

    #[test]
    fn ports_are_neutral_and_unique_for_any_flows(
        group: [u8; 16], relay: [u8; 16], agent: [u8; 16],
        flows in prop::collection::btree_set((any::<[u8; 16]>(), any::<u16>(), any::<u16>()), 1..50),
    ) {
        let mut table = PortTable::default();
        let mut taken = std::collections::BTreeSet::new();
        for (source, source_port, destination_port) in flows {
            let stream = common::maps::StreamKey {
                multicast_address: group, source, source_port, destination_port, vlan: 0, bridge: NO_BRIDGE,
            };
            let ports = table.take(&stream, &relay, &agent).expect("16,384 pairs are enough");
            prop_assert!(ports.agent >= FIRST_PORT && ports.relay >= FIRST_RELAY_PORT);
            let endpoints = common::relay::Endpoints {
                relay_address: relay, relay_port: ports.relay,
                agent_address: agent, agent_port: ports.agent,
            };
            prop_assert!(common::relay::is_neutral(&stream, &endpoints));
            prop_assert!(taken.insert(ports));
        }
    }
}
