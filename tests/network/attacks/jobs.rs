//! Events that keep the agent's loop busy do not make it restart unfinished jobs over and over.

use std::fs;
use std::future;

use common::counter::Counter;
use common::testing::frame::{Frame, record};
use roamcast::datapath::Limits;
use roamcast::proto::DatapathEvent;
use support::netns::wait_for;

use super::{LIMITS, count, with_attacker};

fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}

#[test]
fn snapshot_that_other_events_interrupt_is_read_once() {
    with_attacker(|_, guest, datapath, wire| {
        let limits = Limits {
            listeners: 20_000,
            ..LIMITS
        };
        datapath
            .attach_port(guest.ifindex, "vnet0", &limits)
            .unwrap();
        for first in (0..12_000).step_by(60) {
            let records: Vec<_> = (first..first + 60)
                .map(|number| record(4, &format!("ff1e::6:{number:x}"), &[]))
                .collect();
            wire.send(&Frame::report(&records).bytes());
        }
        wait_for("all Reports", || {
            (count(datapath, Counter::ReportsV2) >= 200).then_some(())
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut events = datapath.events().unwrap();
            let before = threads();
            let mut most = before;
            for _ in 0..500 {
                tokio::select! {
                    biased;
                    event = events.next() => {
                        assert!(matches!(event, Ok(DatapathEvent::Snapshot { .. })));
                        break;
                    }
                    () = future::ready(()) => most = most.max(threads()),
                }
            }
            assert!(most <= before + 1, "{before} threads became {most}");
        });
    });
}
