//! Rows of `roamcast status` about the bridge's ports and their programs.

use std::collections::BTreeMap;

use common::maps::PortUsage;

use super::super::RuntimeError;
use super::super::event_loop::EventLoop;
use super::super::hooks::Role;
use crate::control::report::{PortRow, UplinkRow};
use crate::datapath::{DatapathError, HookView};
use crate::net::tap_queue::TapQueues;
use crate::runtime::hooks_of;

/// Programs by interface index.
pub(super) type Hooks = BTreeMap<u32, Vec<HookView>>;

impl EventLoop {
    pub(super) fn uplink_rows(&self, hooks: &Hooks) -> Vec<UplinkRow> {
        let uplinks = self.hooks.ports().filter(|it| it.role == Role::Uplink);
        uplinks
            .map(|uplink| UplinkRow {
                name: uplink.port.name.clone(),
                ifindex: uplink.port.ifindex,
                hooks: hooks_of(hooks, uplink.port.ifindex),
            })
            .collect()
    }

    /// Returns a row for each TAP, including TAPs without programs.
    pub(super) fn port_rows(&self, hooks: &Hooks) -> Result<Vec<PortRow>, RuntimeError> {
        let taps = self.hooks.ports().filter(|it| it.role == Role::Tap);
        let mut queues = TapQueues::open().ok();
        // A TAP that is gone has no queue.
        let mut tap_full = |ifindex| {
            let counts = queues.as_mut()?.counts(ifindex);
            counts.ok().map(|counts| counts.dropped)
        };
        taps.map(|tap| {
            let port = &tap.port;
            let usage = match self.datapath.usage(port.ifindex) {
                Err(DatapathError::NoPort(_)) => PortUsage::default(),
                usage => usage?,
            };
            let mut domains = self.proto.view().domains();
            let domain = domains.find(|domain| {
                let mut interfaces = domain.interfaces.iter();
                interfaces.any(|interface| interface.target_dev == port.name)
            });
            let row = PortRow::new(
                port.name.clone(),
                port.ifindex,
                domain.map(|domain| domain.name.clone()),
                hooks_of(hooks, port.ifindex),
                &self.hooks.limits(),
                &usage,
            );
            Ok(PortRow {
                tap_full: tap_full(port.ifindex).unwrap_or_default(),
                ..row
            })
        })
        .collect()
    }
}
