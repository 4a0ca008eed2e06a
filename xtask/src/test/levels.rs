//! Levels of tests: which tests run where, and which of them run on a stock kernel.

use clap::ValueEnum;

/// Levels of tests, cheapest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Level {
    /// Format, lints, documentation.
    Lint,
    /// Unit and simulation tests, without privileges.
    Unit,
    /// A minute of `cargo xtask fuzz`, without privileges.
    Fuzz,
    /// Kernel programs by test-run; needs root.
    Program,
    /// Namespaces with real kernel listeners, bridges and routers; needs root.
    Network,
    /// Real virtual machines and migrations; needs root.
    Vm,
    /// The quick part of program, network and vm on each stock kernel, in an emulated machine;
    /// needs root.
    Host,
}

/// Kernels of the level `host`.
pub(crate) const KERNELS: [&str; 2] = ["6.1", "6.12"];

/// Test targets of the `tests` package by level.
pub(crate) const TARGETS: [(Level, &[&str]); 3] = [
    (Level::Program, PROGRAM),
    (Level::Network, NETWORK),
    (Level::Vm, VM),
];

const PROGRAM: &[&str] = &[
    "object",
    "prog_test_run",
    "parity",
    "relay_programs",
    "gate_programs",
    "gate_races",
    "mat_programs",
    "forward_programs",
    "trace_programs",
];
const NETWORK: &[&str] = &[
    "snoop",
    "attacks",
    "gate",
    "aggregates",
    "gate_probes",
    "cuts",
    "hooks",
    "membership",
    "tap_queue",
    "trace",
    "restart",
    "relay_path",
    "relay_server",
    "bench_smoke",
    "peers",
    "peer_certificates",
    "ims",
    "mat_path",
    "forwarding",
    "unread",
    "units",
    "vhost",
    "lab_network",
    "lab_hosts",
    "lab_removal",
    "machine",
];
const VM: &[&str] = &[
    "guest",
    "migration",
    "handover",
    "hook",
    "queries",
    "refusals",
    "failures",
    "limits",
    "relay",
    "streams",
    "mobility",
];

/// Selected tests of one target.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Selection {
    /// Name of the target.
    pub(crate) target: &'static str,
    /// Names of the tests; empty: all tests.
    pub(crate) tests: &'static [&'static str],
}

const fn all(target: &'static str) -> Selection {
    Selection { target, tests: &[] }
}

const fn only(target: &'static str, tests: &'static [&'static str]) -> Selection {
    Selection { target, tests }
}

/// Tests of the level `vm` on a stock kernel: one migration, relay, restart and failure.
pub(crate) const VM_ON_HOST: &[Selection] = &[
    only("migration", &["a_light_stream_goes_on_through_one_move"]),
    only(
        "relay",
        &[
            "guest_that_moves_to_a_site_without_multicast_gets_its_stream_from_a_relay",
            "killed_relay_and_killed_agent_lose_no_packet_and_are_adopted",
        ],
    ),
    only("failures", &["operator_can_abort_in_every_phase"]),
    all("limits"),
];

/// Targets that start machines themselves and therefore cannot run in a machine.
pub(crate) const NOT_ON_HOST: &[&str] = &["machine"];

/// Tests that CI runs on each stock kernel, within 15 minutes: every program loaded, attached by
/// each hook and run; the main path of each in a namespace; one migration by KVM with vhost-net.
pub(crate) const QUICK: &[Selection] = &[
    all("prog_test_run"),
    all("gate_programs"),
    all("relay_programs"),
    all("mat_programs"),
    all("forward_programs"),
    all("trace_programs"),
    only(
        "trace",
        &["held_replayed_dropped_and_restored_packets_are_explained"],
    ),
    only(
        "snoop",
        &[
            "an_mldv1_listener_is_found_and_leaves",
            "mldv2_filters_follow_the_guests_sockets",
            "the_first_packet_of_a_watched_address_is_told_and_counted",
            "filters_work_where_tcx_is_not_used",
        ],
    ),
    only(
        "gate",
        &[
            "held_frames_do_not_come_out_and_those_past_the_gate_do",
            "frames_are_held_while_the_agent_is_away",
        ],
    ),
    only(
        "restart",
        &[
            "no_report_is_lost_while_the_agent_is_away",
            "a_program_is_attached_again_right_after_it_was_detached",
        ],
    ),
    only(
        "relay_path",
        &[
            "tc_is_chosen_where_checksums_may_not_be_finished",
            "xdp_keeps_to_its_hook_when_the_mtu_is_raised_and_restores_jumbo_packets",
            "xdp_is_attached_to_an_uplink_with_jumbo_frames_and_restores_them",
        ],
    ),
    only(
        "hooks",
        &[
            "bandwidth::limits_of_a_domain_can_be_set_changed_and_cleared_at_any_time",
            "foreign::foreign_clsact_is_used_and_what_is_before_us_on_it_is_told",
            "leftover::cleanup_takes_links_maps_and_filters_away",
        ],
    ),
    only(
        "mat_path",
        &["tcp_and_udp_go_both_ways_whoever_finishes_checksums"],
    ),
    only(
        "forwarding",
        &[
            "packets_for_the_old_address_reach_the_new_one_whoever_finishes_their_checksums",
            "packets_are_sent_on_at_xdp_too",
        ],
    ),
    all("vhost"),
    only(
        "unread",
        &["what_the_vm_has_not_read_is_sent_on_in_order_before_what_comes_later"],
    ),
    only("migration", &["a_light_stream_goes_on_through_one_move"]),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_of_one_level() {
        let manifest = include_str!("../../../tests/Cargo.toml");
        let mut known: Vec<_> = [PROGRAM, NETWORK, VM].concat();
        for section in manifest.split("\n[[test]]\nname = \"").skip(1) {
            let name = section.split('"').next().unwrap();
            let at = known.iter().position(|it| *it == name);
            known.swap_remove(at.unwrap_or_else(|| panic!("{name} runs at no level")));
        }
        assert!(known.is_empty(), "no such targets: {known:?}");
    }

    #[test]
    fn tests_that_are_selected_exist() {
        let directory = crate::run::root().join("tests");
        for selection in QUICK.iter().chain(VM_ON_HOST) {
            for test in selection.tests {
                let (file, test) = match test.split_once("::") {
                    Some((module, test)) => (format!("{}/{module}", selection.target), test),
                    None => (selection.target.to_owned(), *test),
                };
                let file = directory.join(file).with_extension("rs");
                let source = std::fs::read_to_string(&file).unwrap();
                assert!(
                    source.contains(&format!("#[test]\nfn {test}() ")),
                    "{} has no test {test}",
                    file.display()
                );
            }
        }
    }
}
