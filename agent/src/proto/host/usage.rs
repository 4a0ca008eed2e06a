//! VMs' usage of their limits, and warnings about VMs that reach a limit.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{ManagedKey, PortUsage};
use tracing::{debug, warn};

use crate::proto::context::Context;
use crate::proto::host::inventory::Inventory;
use crate::proto::timer::Timer;
use crate::proto::{Output, Timestamp};

/// Time between two warnings about the same VM.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// Last usage of each port, and time of the last warning about the port.
#[derive(Debug, Default)]
pub(in crate::proto) struct Usage {
    last: BTreeMap<u32, PortUsage>,
    warned: BTreeMap<u32, Timestamp>,
    /// Time of the last warning about a failed address.
    failed: Option<Timestamp>,
}

impl Usage {
    /// Returns the last usage of a port.
    pub(in crate::proto) fn of_port(&self, ifindex: u32) -> Option<&PortUsage> {
        self.last.get(&ifindex)
    }

    pub(in crate::proto) fn forget_port(&mut self, ifindex: u32) {
        self.last.remove(&ifindex);
        self.warned.remove(&ifindex);
    }

    /// Requests the ports' usage, now and periodically.
    pub(in crate::proto) fn due(cx: &mut Context, inventory: &Inventory) {
        if !inventory.ports.is_empty() {
            cx.outputs.push_back(Output::ReadUsage);
        }
        let due = cx.now + cx.config.timing.usage_interval;
        cx.timers.set(Timer::Usage, due);
    }

    /// Records a port's usage, and warns about a VM that exceeded a limit since the last reading.
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

    /// Logs that the kernel could not set up an address. MDB entries are retried, a thousand at a time,
    /// so only the first failure within a while is a warning.
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
