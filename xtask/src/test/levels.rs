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

/// Test programs of the package `tests`, one for each of these levels. The modules of a program are
/// the level's tests.
pub(crate) const PROGRAMS: [(Level, &str); 3] = [
    (Level::Program, "program"),
    (Level::Network, "network"),
    (Level::Vm, "vm"),
];

/// Tests of the level `vm` on a stock kernel: one migration, relay, restart and failure.
pub(crate) const VM_ON_HOST: &[&str] = &[
    "migration::a_light_stream_goes_on_through_one_move",
    "relay::guest_that_moves_to_a_site_without_multicast_gets_its_stream_from_a_relay",
    "relay::killed_relay_and_killed_agent_lose_no_packet_and_are_adopted",
    "failures::operator_can_abort_in_every_phase",
    "limits",
];

/// Modules that start machines themselves and therefore cannot run in a machine.
pub(crate) const NOT_ON_HOST: &[&str] = &["machine"];

/// Tests that CI runs on each stock kernel, within 15 minutes: every program loaded, attached by
/// each hook and run; the main path of each in a namespace; one migration by KVM with vhost-net.
pub(crate) const QUICK: &[&str] = &[
    "prog_test_run",
    "gate_programs",
    "relay_programs",
    "mat_programs",
    "forward_programs",
    "trace_programs",
    "trace::held_replayed_dropped_and_restored_packets_are_explained",
    "snoop::an_mldv1_listener_is_found_and_leaves",
    "snoop::mldv2_filters_follow_the_guests_sockets",
    "snoop::the_first_packet_of_a_watched_address_is_told_and_counted",
    "snoop::filters_work_where_tcx_is_not_used",
    "gate::held_frames_do_not_come_out_and_those_past_the_gate_do",
    "gate::frames_are_held_while_the_agent_is_away",
    "restart::no_report_is_lost_while_the_agent_is_away",
    "restart::a_program_is_attached_again_right_after_it_was_detached",
    "relay_path::tc_is_chosen_where_checksums_may_not_be_finished",
    "relay_path::xdp_keeps_to_its_hook_when_the_mtu_is_raised_and_restores_jumbo_packets",
    "relay_path::xdp_is_attached_to_an_uplink_with_jumbo_frames_and_restores_them",
    "hooks::bandwidth::limits_of_a_domain_can_be_set_changed_and_cleared_at_any_time",
    "hooks::foreign::foreign_clsact_is_used_and_what_is_before_us_on_it_is_told",
    "hooks::leftover::cleanup_takes_links_maps_and_filters_away",
    "mat_path::tcp_and_udp_go_both_ways_whoever_finishes_checksums",
    "forwarding::packets_for_the_old_address_reach_the_new_one_whoever_finishes_their_checksums",
    "forwarding::packets_are_sent_on_at_xdp_too",
    "vhost",
    "unread::what_the_vm_has_not_read_is_sent_on_in_order_before_what_comes_later",
    "migration::a_light_stream_goes_on_through_one_move",
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    /// Returns the modules that the test programs declare, each with the folder of its program.
    fn modules() -> BTreeMap<String, PathBuf> {
        let mut modules = BTreeMap::new();
        for (_, program) in PROGRAMS {
            let folder = crate::run::root().join("tests").join(program);
            let main = fs::read_to_string(folder.join("main.rs")).unwrap();
            let declared = main.lines().filter_map(|line| line.strip_prefix("mod "));
            for module in declared.filter_map(|rest| rest.strip_suffix(';')) {
                let other = modules.insert(module.to_owned(), folder.clone());
                assert_eq!(other, None, "{module} is a module of two programs");
            }
        }
        modules
    }

    #[test]
    fn every_file_of_a_level_is_a_module_of_its_program() {
        let modules = modules();
        for (_, program) in PROGRAMS {
            let folder = crate::run::root().join("tests").join(program);
            for entry in fs::read_dir(&folder).unwrap() {
                let file = entry.unwrap().path().with_extension("");
                let name = file.file_name().unwrap().to_str().unwrap();
                assert!(
                    name == "main" || modules.get(name) == Some(&folder),
                    "{program}/main.rs does not declare {name}"
                );
            }
        }
    }

    #[test]
    fn tests_that_are_selected_exist() {
        let modules = modules();
        for name in QUICK.iter().chain(VM_ON_HOST).chain(NOT_ON_HOST) {
            let mut parts = name.split("::");
            let module = parts.next().unwrap();
            let mut path = modules
                .get(module)
                .unwrap_or_else(|| panic!("{name}: no program has the module"))
                .join(module);
            for part in parts {
                let source = fs::read_to_string(path.with_extension("rs")).unwrap();
                assert!(
                    source.contains(&format!("\nmod {part};\n"))
                        || source.contains(&format!("#[test]\nfn {part}() ")),
                    "{name}: {} has no {part}",
                    path.display()
                );
                path.push(part);
            }
        }
    }
}
