//! Shared context of the agent's state machines: time, configuration, timers, outputs, transaction
//! numbers, connections to peers and VMs, and records of migrations.

use std::collections::VecDeque;
use std::time::Duration;

use super::links::peers::Links;
use super::links::vm::Vms;
use super::record::Records;
use super::timer::{Timer, TimerTable};
use super::{AgentConfig, CommandReply, CopyTls, Output, Timestamp};

/// State that no single machine owns. A machine changes only this context and its own fields.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) config: AgentConfig,
    /// Time of the current input.
    pub(super) now: Timestamp,
    /// Time of the first input; `None` before.
    started: Option<Timestamp>,
    pub(super) outputs: VecDeque<Output>,
    pub(super) timers: TimerTable<Timer>,
    pub(super) numbers: Numbers,
    /// Whether QEMU can encrypt memory copies on this host.
    pub(super) copy_tls: CopyTls,
    pub(super) links: Links,
    /// Answers to VMs, and rate limits of their requests.
    pub(super) vms: Vms,
    /// Records of the last migrations.
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

    /// Starts an input at `now`; returns true for the first input.
    pub(super) fn begin(&mut self, now: Timestamp) -> bool {
        self.now = self.now.max(now);
        let is_first = self.started.is_none();
        self.started.get_or_insert(self.now);
        is_first
    }

    /// Returns the time since the first input.
    pub(super) fn uptime(&self) -> Duration {
        self.now.since(self.started.unwrap_or(self.now))
    }

    /// Replies to an operator's command.
    pub(super) fn reply(&mut self, command: u64, reply: CommandReply) {
        self.outputs.push_back(Output::Reply { command, reply });
    }
}

/// Datagrams, frames and addresses that the agent did not act upon, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Datagrams from a port that is not, or no longer, on the bridge.
    pub unknown_port_datagrams: u64,
    /// Datagrams from a port without a domain.
    pub datagrams_without_domain: u64,
    /// Datagrams from a source address that is not link-local.
    pub off_link_datagrams: u64,
    /// Datagrams that cannot be decoded, or carry a message that no VM sends.
    pub malformed_datagrams: u64,
    /// Frames from peers that cannot be decoded.
    pub malformed_frames: u64,
    /// Implausible announcements of relays; each ended a session.
    pub relay_lies: u64,
    /// Sessions that a relay refused or ended.
    pub relay_refusals: u64,
    /// Failovers to another relay.
    pub relay_failovers: u64,
    /// Addresses refused to arriving VMs.
    pub claims_refused: u64,
    /// Addresses that arrived VMs never sent from.
    pub claims_silent: u64,
    /// Addresses of moving VMs that another node has too.
    pub addresses_disputed: u64,
    /// Addresses whose ownership a VM did not prove; the agent forwards no packets for these.
    pub forwards_refused: u64,
}

/// Generator of transaction numbers and tokens (splitmix64).
#[derive(Debug)]
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn next(&mut self) -> u64 {
        splitmix64(&mut self.0)
    }
}

/// Returns the next number of the sequence.
pub(super) fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}
