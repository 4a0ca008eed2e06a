//! What the ports' VMs have used of their limits, and warnings about those that reach them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{ManagedKey, PortUsage};
use tracing::{debug, warn};

use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::timer::Timer;
use crate::proto::{Output, Timestamp};

/// How long a VM that was named in the log for reaching a limit is not named again.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Last usage of each port, and when it was last warned about.
#[derive(Debug, Default)]
pub(in crate::proto) struct Usage {
    last: BTreeMap<u32, PortUsage>,
    warned: BTreeMap<u32, Timestamp>,
    /// When an address was last said not to be set up.
    failed: Option<Timestamp>,
}

impl Usage {
    /// The last usage read of a port.
    pub(in crate::proto) fn of_port(&self, ifindex: u32) -> Option<&PortUsage> {
        self.last.get(&ifindex)
    }

    pub(in crate::proto) fn forget_port(&mut self, ifindex: u32) {
        self.last.remove(&ifindex);
        self.warned.remove(&ifindex);
    }

    /// Has the usage be read, now and again.
    pub(in crate::proto) fn due(cx: &mut Context, inventory: &Inventory) {
        if !inventory.ports.is_empty() {
            cx.outputs.push_back(Output::ReadUsage);
        }
        let due = cx.now + cx.config.timing.usage_interval;
        cx.timers.set(Timer::Usage, due);
    }

    /// Takes in the usage of a port, and names a VM that has gone over its limits since.
    pub(in crate::proto) fn read(
        &mut self,
        now: Timestamp,
        inventory: &Inventory,
        ifindex: u32,
        usage: PortUsage,
    ) {
        if !inventory.ports.contains_key(&ifindex) {
            return;
        }
        let before = self.last.insert(ifindex, usage);
        let before = before.unwrap_or_default();
        let grown: BTreeSet<_> = [
            (before.refused_reports, usage.refused_reports, "Reports"),
            (
                before.refused_listeners,
                usage.refused_listeners,
                "listeners",
            ),
            (before.refused_sources, usage.refused_sources, "sources"),
            (before.malformed, usage.malformed, "malformed MLD"),
        ]
        .into_iter()
        .filter(|(before, after, _)| after > before)
        .map(|(_, _, what)| what)
        .collect();
        let quiet = self
            .warned
            .get(&ifindex)
            .is_some_and(|last| now.since(*last) < WARNING_INTERVAL);
        if grown.is_empty() || quiet {
            return;
        }
        self.warned.insert(ifindex, now);
        let domain = inventory.domain_of_port(ifindex);
        let port = inventory.ports.get(&ifindex);
        warn!(
            domain = domain.map_or("unknown", |domain| &domain.name),
            port = port.map_or("unknown", |port| &port.name),
            over = ?grown,
            refused_reports = usage.refused_reports,
            refused_listeners = usage.refused_listeners,
            refused_sources = usage.refused_sources,
            malformed = usage.malformed,
            "VM is over its limits; what is over them is refused"
        );
    }

    /// An address could not be set up in the kernel. MDB entries are tried again and again, a thousand at
    /// once: one line tells it.
    pub(in crate::proto) fn failed(&mut self, now: Timestamp, key: &ManagedKey, reason: &str) {
        let (vlan, address) = (key.vlan, Ipv6Addr::from(key.multicast_address));
        let is_quiet = self
            .failed
            .is_some_and(|last| now.since(last) < WARNING_INTERVAL);
        if is_quiet {
            debug!(vlan, %address, %reason, "Address is not set up");
        } else {
            warn!(vlan, %address, %reason, "Address is not set up");
            self.failed = Some(now);
        }
    }
}
