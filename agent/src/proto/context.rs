//! What every machine of the agent's protocol is lent: the time, the configuration, timers, outputs,
//! transaction numbers and the connections to peers.

use std::collections::VecDeque;

use common::signal::PeerMessage;

use super::link::Links;
use super::timer::{Timer, TimerTable};
use super::{AgentConfig, Counters, Output, Timestamp};

/// What no machine owns. A machine changes nothing else but its own fields.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) config: AgentConfig,
    /// Time of the input being handled.
    pub(super) now: Timestamp,
    pub(super) outputs: VecDeque<Output>,
    pub(super) timers: TimerTable<Timer>,
    pub(super) numbers: Numbers,
    pub(super) links: Links,
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
            links: Links::default(),
            counters: Counters::default(),
        }
    }

    /// Whether the connection to a peer is up.
    pub(super) fn is_up(&self, peer: &str) -> bool {
        self.links.get(peer).is_some_and(|link| link.up)
    }

    /// Asks for a connection unless there is one or one is being made.
    pub(super) fn connect(&mut self, peer: &str) {
        let link = self.links.entry(peer.to_owned()).or_default();
        if !link.up && !link.connecting {
            link.connecting = true;
            self.outputs.push_back(Output::Connect {
                peer: peer.to_owned(),
            });
        }
    }

    /// Sends a message if the connection is up.
    pub(super) fn send(&mut self, peer: &str, transaction: u64, message: &PeerMessage) {
        if self.is_up(peer) {
            self.outputs.push_back(Output::Frame {
                peer: peer.to_owned(),
                bytes: message.encode(transaction),
            });
        }
    }
}

/// Source of transaction numbers and tokens (splitmix64).
#[derive(Debug)]
pub(super) struct Numbers(u64);

impl Numbers {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
