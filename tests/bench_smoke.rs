//! The benches of the relay run, every way delivers, and every UDP checksum is right.

#[path = "bench_relay/mod.rs"]
mod bench_relay;
#[path = "support/netns.rs"]
mod netns;
#[path = "support/tap.rs"]
mod tap;

use bench_relay::Options;

#[test]
fn every_way_delivers_packets_with_right_checksums() {
    if !netns::privileged() {
        return;
    }
    let report = bench_relay::relay(&Options::quick()).unwrap_or_else(|error| panic!("{error:?}"));
    let [setting] = &report.settings[..] else {
        panic!("{report:?}");
    };
    for way in &setting.ways {
        // All of an unmeasured part, and some of the rest.
        assert!(way.checked >= 256 * setting.taps as u64, "{way:?}");
        assert_eq!(way.wrong, 0, "{way:?}");
        assert!(
            way.stream_cpu_ns.median > 0.0 && way.full_per_second.median > 0.0,
            "{way:?}"
        );
        let in_userspace = ["recvmmsg/sendmmsg", "socat"].contains(&way.way.as_str());
        assert_eq!(way.original_source, !in_userspace, "{way:?}");
    }
}

#[test]
fn every_copy_reaches_its_subscriber() {
    if !netns::privileged() {
        return;
    }
    let report =
        bench_relay::replicate(&Options::quick()).unwrap_or_else(|error| panic!("{error:?}"));
    let [setting] = &report.settings[..] else {
        panic!("{report:?}");
    };
    for way in &setting.ways {
        assert!(way.full_per_second.median > 0.0, "{way:?}");
        assert!(way.sent > 0 && way.lost == 0, "{way:?}");
    }
}
