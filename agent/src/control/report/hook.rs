//! Kernel programs on interfaces.

use serde::{Deserialize, Serialize};

use crate::datapath::HookView;

/// A kernel program on an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// Name of the program (`snoop`).
    pub program: String,
    /// How it is attached (`tcx`, `filter`, `xdp-native`, `xdp-generic`).
    pub mode: String,
    /// The side of the interface that it is on (`ingress`, `egress`).
    pub side: String,
    /// The qdisc that its filter is on; absent where it is attached in another way.
    pub qdisc: Option<String>,
    /// Who sees packets before it, in this order.
    pub before: Vec<String>,
    /// Whether the kernel still has it there.
    pub is_there: bool,
}

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
    /// Its name.
    pub name: String,
    /// Its interface index.
    pub ifindex: u32,
    /// Programs on it.
    pub hooks: Vec<Hook>,
}
