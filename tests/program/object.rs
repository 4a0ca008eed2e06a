//! The eBPF object as built, without a kernel: every machine sees what the verifiers of old kernels
//! refuse.

#![allow(clippy::expect_used, reason = "helpers of tests may panic like tests")]

use support::linked::Linked;

/// Limit for the stack of a call chain, bytes. The kernel's limit is 512; the difference is a
/// reserve for compilers that lay out frames differently.
const STACK_BYTES: usize = 448;

fn programs() -> Vec<Linked> {
    let objects = [
        roamcast::datapath::object::HOST,
        roamcast::datapath::object::HOST_TRACED,
        roamcast::datapath::object::READS,
        migkick::datapath::object::GUEST,
    ];
    objects.into_iter().flat_map(Linked::all).collect()
}

#[test]
fn no_loop_is_closed_by_a_fall_through() {
    let found: Vec<String> = programs()
        .iter()
        .flat_map(|program| {
            let edges = program.fall_through_back_edges();
            edges
                .into_iter()
                .map(|edge| format!("{}: {edge}", program.name))
        })
        .collect();
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn every_chain_of_calls_keeps_to_the_stack() {
    let mut beyond = Vec::new();
    for program in programs() {
        let (bytes, chain) = program.deepest_stack();
        println!(
            "{}: {} instructions, {bytes} bytes of stack",
            program.name,
            program.instruction_count()
        );
        if bytes > STACK_BYTES {
            beyond.push(format!("{} takes {bytes} bytes: {chain}", program.name));
        }
    }
    assert!(beyond.is_empty(), "{}", beyond.join("\n"));
}
