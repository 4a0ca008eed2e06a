//! What every machine of the agent's protocol is lent: the time, the configuration, timers, outputs,
//! transaction numbers, the connections to peers and VMs, and the records of migrations.

use std::collections::VecDeque;

use super::links::peers::Links;
use super::links::vm::Vms;
use super::record::Records;
use super::timer::{Timer, TimerTable};
use super::{AgentConfig, CommandReply, CopyTls, Counters, Output, Timestamp};

/// What no machine owns. A machine changes nothing else but its own fields.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) config: AgentConfig,
    /// Time of the input being handled.
    pub(super) now: Timestamp,
    pub(super) outputs: VecDeque<Output>,
    pub(super) timers: TimerTable<Timer>,
    pub(super) numbers: Numbers,
    /// Whether QEMU can encrypt copies here.
    pub(super) copy_tls: CopyTls,
    pub(super) links: Links,
    /// What VMs were told, and how often they may ask.
    pub(super) vms: Vms,
    /// What is remembered of each migration.
    pub(super) records: Records,
    pub(super) counters: Counters,
}

impl Context {
    pub(super) fn new(config: AgentConfig, seed: u64) -> Self {
        Self {
            config,
            now: Timestamp::default(),
            outputs: VecDeque::new(),
            timers: TimerTable::default(),
            numbers: Numbers(seed),
            copy_tls: CopyTls::default(),
            links: Links::default(),
            vms: Vms::default(),
            records: Records::default(),
            counters: Counters::default(),
        }
    }

    /// Answers an operator's command.
    pub(super) fn reply(&mut self, command: u64, reply: CommandReply) {
        self.outputs.push_back(Output::Reply { command, reply });
    }
}

/// Source of transaction numbers and tokens (splitmix64).
#[derive(Debug)]
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn next(&mut self) -> u64 {
        splitmix64(&mut self.0)
    }
}

/// Returns the next number of a sequence.
pub(super) fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
