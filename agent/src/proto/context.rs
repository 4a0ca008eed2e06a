//! What every machine of the agent's protocol is lent: the time, the configuration, timers, outputs,
//! transaction numbers, the connections to peers and VMs, and the records of migrations.

use std::collections::VecDeque;
use std::time::Duration;

use super::links::peers::Links;
use super::links::vm::Vms;
use super::record::Records;
use super::timer::{Timer, TimerTable};
use super::{AgentConfig, CommandReply, CopyTls, Output, Timestamp};

/// What no machine owns. A machine changes nothing else but its own fields.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) config: AgentConfig,
    /// Time of the input being handled.
    pub(super) now: Timestamp,
    /// Time of the first input.
    started: Option<Timestamp>,
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
            started: None,
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

    /// An input comes, at `now`; `true` for the first one.
    pub(super) fn begin(&mut self, now: Timestamp) -> bool {
        self.now = self.now.max(now);
        let is_first = self.started.is_none();
        self.started.get_or_insert(self.now);
        is_first
    }

    /// Time since the first input.
    pub(super) fn uptime(&self) -> Duration {
        self.now.since(self.started.unwrap_or(self.now))
    }

    /// Answers an operator's command.
    pub(super) fn reply(&mut self, command: u64, reply: CommandReply) {
        self.outputs.push_back(Output::Reply { command, reply });
    }
}

/// Datagrams and frames that were not acted upon, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams of a port that the bridge does not have (any more).
    pub unknown_port_datagrams: u64,
    /// Datagrams of a port behind which there is no domain.
    pub datagrams_without_domain: u64,
    /// Datagrams whose sender is not a link-local address.
    pub off_link_datagrams: u64,
    /// Datagrams that are no message, or none that a VM sends.
    pub malformed_datagrams: u64,
    /// Frames of peers that are no message.
    pub malformed_frames: u64,
    /// Announcements of relays that cannot be true; each has ended a session.
    pub relay_lies: u64,
    /// Sessions that a relay has refused or ended.
    pub relay_refusals: u64,
    /// Relays asked to take over from another.
    pub relay_failovers: u64,
    /// Addresses that arriving VMs cannot have.
    pub claims_refused: u64,
    /// Addresses that arrived VMs have never spoken from.
    pub claims_silent: u64,
    /// Addresses of moving VMs that somebody else has too.
    pub addresses_disputed: u64,
    /// Addresses that a VM is not believed to be its own; nothing is sent on for them.
    pub forwards_refused: u64,
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
