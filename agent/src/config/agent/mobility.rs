//! `[mobility]` of the agent's configuration: unicast addresses of migrating VMs.

use std::time::Duration;

use serde::Deserialize;

use super::super::value;
use crate::proto::{Dispute, UnicastTiming};

/// Timers of Duplicate Address Detection and of forwarding.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mobility {
    /// Time that the owner of an address has to answer Duplicate Address Detection (`RetransTimer`,
    /// RFC 4861 §6.3.2).
    #[serde(
        rename = "retransmit_ms",
        deserialize_with = "value::milliseconds::<100, 10_000, _>"
    )]
    pub retransmit: Duration,
    /// Time for which the source forwards packets for an address that a VM has left, and keeps the
    /// address from other VMs.
    #[serde(
        rename = "forward_s",
        deserialize_with = "value::seconds::<0, 3600, _>"
    )]
    pub forward: Duration,
    /// Time that an arrived VM has to send from its new address.
    #[serde(
        rename = "defence_s",
        deserialize_with = "value::seconds::<1, 3600, _>"
    )]
    pub defence: Duration,
    /// What happens to a migration when another node claims the address.
    pub disputed: Dispute,
}

impl Default for Mobility {
    fn default() -> Self {
        let timing = UnicastTiming::default();
        Self {
            retransmit: timing.retransmit,
            forward: timing.forward,
            defence: timing.defence,
            disputed: timing.disputed,
        }
    }
}
