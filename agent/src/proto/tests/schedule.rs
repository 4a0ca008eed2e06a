//! Random orders of all messages to a destination host.

use std::time::Duration;

use common::maps::FilterMode;
use common::signal::{MigrationAbort, MigrationProgress, Phase, Reason};
use proptest::prelude::*;

use super::fixture::{Bench, UUID, key};
use crate::proto::arrival::tests::{active, first_packet, request};
use crate::proto::fuzz::kernel::Kernel;
use crate::proto::*;

const ARRIVING: u32 = 20;
const OTHER: DomainUuid = DomainUuid([9; 16]);

fn tell(bench: &mut Bench, what: u8) {
    let progress = |phase| MigrationProgress {
        phase,
        processed_bytes: 1,
        total_bytes: 2,
        elapsed_ms: 3,
        vm_pause_ms: None,
        clock_ns: None,
    };
    let reason = "cancelled".to_owned();
    match what {
        0 => bench.frame(1, request(UUID, vec![active(1), active(2)])),
        1 => bench.frame(2, request(UUID, vec![active(2), active(3)])),
        2 => bench.frame(3, request(OTHER, vec![active(1), active(3)])),
        3 => bench.frame(1, MigrationAbort(Reason::unspecified(reason))),
        4 => bench.frame(2, MigrationAbort(Reason::unspecified(reason))),
        5 => bench.port(ARRIVING, "vnet5"),
        6 => bench.unplug(ARRIVING),
        7 => bench.domain("vnet5", false),
        8 => bench.domain("vnet5", true),
        9 => bench.hypervisor(HypervisorEvent::Gone(UUID)),
        10 => bench.report(ARRIVING, key(1), FilterMode::Exclude),
        11 => bench.report(ARRIVING, key(2), FilterMode::Exclude),
        12 => bench.leave(ARRIVING, key(1)),
        13 => crate::proto::arrival::tests::query(bench),
        14 => first_packet(bench, 1, 1),
        15 => first_packet(bench, 2, 1),
        16 => bench.peer(PeerEvent::Up { from: None }),
        17 => bench.peer(PeerEvent::Down {
            reason: "Connection to vms2 was reset".to_owned(),
        }),
        18 => bench.frame(1, progress(Phase::Copying)),
        19 => bench.frame(2, progress(Phase::Completed)),
        20 => bench.pass(Duration::from_millis(30)),
        21 => bench.pass(Duration::from_secs(2)),
        _ => bench.pass(Duration::from_secs(100)),
    }
}

proptest! {
    #[test]
    fn any_order_of_events_leaves_no_join_and_no_watched_address(
        schedule in prop::collection::vec(0_u8..23, 0..60)
    ) {
        let mut bench = Bench::empty();
        let mut kernel = Kernel::default();
        for what in schedule {
            tell(&mut bench, what);
            bench.outputs().iter().for_each(|it| kernel.apply(it));
        }
        bench.unplug(ARRIVING);
        bench.hypervisor(HypervisorEvent::Gone(UUID));
        bench.pass(Duration::from_secs(1300));
        // A listener at a removed port expires; the kernel has no entry.
        for number in [1, 2] {
            bench.leave(ARRIVING, key(number));
        }
        bench.outputs().iter().for_each(|it| kernel.apply(it));
        prop_assert!(kernel.joined.is_empty(), "{kernel:?}");
        prop_assert!(kernel.managed.is_empty(), "{kernel:?}");
        prop_assert_eq!(bench.agent.view().receptions().count(), 0);
    }
}
