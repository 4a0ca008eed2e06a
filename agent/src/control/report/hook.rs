//! Rows about kernel programs on interfaces.

use serde::{Deserialize, Serialize};

#[cfg(feature = "programs")]
use crate::datapath::HookView;

/// A kernel program attached to an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Name of the program (`snoop`).
    pub program: String,
    /// How it is attached (`tcx`, `filter`, `xdp-native`, `xdp-generic`).
    pub mode: String,
    /// Direction in which the program sees packets (`ingress`, `egress`).
    pub side: String,
    /// Qdisc of the filter; absent for other kinds of attachment.
    pub qdisc: Option<String>,
    /// Programs that see a packet before this one, in order.
    pub before: Vec<String>,
    /// True if the kernel still has the program at this hook.
    pub is_there: bool,
}

#[cfg(feature = "programs")]
impl From<&HookView> for Hook {
    fn from(view: &HookView) -> Self {
        Self {
            program: view.program.name().to_owned(),
            mode: view.hook.as_str().to_owned(),
            side: view.side.as_str().to_owned(),
            qdisc: view.qdisc.clone(),
            before: view.before.clone(),
            is_there: view.is_there,
        }
    }
}

/// A physical port of the bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UplinkRow {
    /// Name of the interface.
    pub name: String,
    /// Interface index.
    pub ifindex: u32,
    /// Programs attached to the interface.
    pub hooks: Vec<Hook>,
}
