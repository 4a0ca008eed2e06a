//! `[mobility]`: the unicast addresses of moving VMs.

use std::time::Duration;

use serde::Deserialize;

use super::value;
use crate::proto::Dispute;

/// `[mobility]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mobility {
    /// How long an owner of an address that a VM wants may take to say so.
    #[serde(
        rename = "retransmit_ms",
        deserialize_with = "value::milliseconds::<100, 10_000, _>"
    )]
    pub retransmit: Duration,
    /// How long packets for an address that a VM has left are sent on at most, and the address is
    /// kept from other VMs.
    #[serde(
        rename = "forward_s",
        deserialize_with = "value::seconds::<0, 3600, _>"
    )]
    pub forward: Duration,
    /// How long an arrived VM may take to speak from its address.
    #[serde(
        rename = "defence_s",
        deserialize_with = "value::seconds::<1, 3600, _>"
    )]
    pub defence: Duration,
    /// What becomes of a move when somebody says that he has the address.
    pub disputed: Dispute,
}

impl Default for Mobility {
    fn default() -> Self {
        Self {
            retransmit: Duration::from_secs(1),
            forward: Duration::from_secs(60),
            defence: Duration::from_secs(30),
            disputed: Dispute::GoOn,
        }
    }
}
