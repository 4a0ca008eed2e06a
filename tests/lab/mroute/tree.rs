//! Decides which flow is forwarded to which site, and from when.
//!
//! Sans-IO: `handle_*` takes inputs, [`Tree::poll_action`] returns the actions for the caller, and
//! [`Tree::poll_timeout`] returns when to call [`Tree::handle_timeout`]. Times are nanoseconds of
//! one clock.
//!
//! A site's branch for a multicast address:
//!
//! ```text
//!            first listener          growth delay over
//!  no branch ----------------> growing ----------------> grown
//!      ^                          |                        |
//!      +--------------------------+------------------------+
//!             last listener gone, or the site loses multicast
//! ```

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::net::Ipv6Addr;
use std::time::Duration;

use super::event::{Action, Event, Flow, LoggedEvent, SiteIndex};
use super::mdb::Change;
use crate::topology::Site;

/// Highest number of flows in the router's table. The router does not route further flows.
const FLOWS_MAX: usize = 65_536;

/// Filter of one port of the switch for one multicast address.
#[derive(Debug, Default)]
struct Port {
    /// Listens to any source that `sources` does not block (EXCLUDE mode).
    any_source: bool,
    /// Sources named by the listener: true if wanted, false if blocked.
    sources: HashMap<Ipv6Addr, bool>,
}

impl Port {
    fn wants(&self, source: Ipv6Addr) -> bool {
        self.sources
            .get(&source)
            .copied()
            .unwrap_or(self.any_source)
    }

    fn is_empty(&self) -> bool {
        !self.any_source && !self.sources.values().any(|wanted| *wanted)
    }
}

/// Filter of a site for one multicast address.
#[derive(Debug, Default)]
struct Branch {
    /// Filters of the ports, by the port's ifindex on the switch.
    ports: HashMap<u32, Port>,
    /// Time of the first listener; `None` without a listener.
    since: Option<u64>,
    grown: bool,
}

#[derive(Debug)]
struct SiteState {
    kind: Site,
    branches: HashMap<Ipv6Addr, Branch>,
    /// Times at which branches are complete. An entry stays when its branch is pruned.
    growing: BinaryHeap<Reverse<(u64, Ipv6Addr)>>,
    /// Time of the last change of the site's kind.
    changed: u64,
}

#[derive(Debug)]
struct FlowState {
    incoming: u16,
    sites: Vec<SiteIndex>,
}

/// The router's decisions. See the module documentation.
#[derive(Debug)]
pub struct Tree {
    sites: Vec<SiteState>,
    flows: HashMap<Flow, FlowState>,
    sources: HashMap<Ipv6Addr, Vec<Ipv6Addr>>,
    actions: VecDeque<Action>,
    /// Time of the last input.
    now: u64,
    /// True after a flow was refused; the refusal is logged once.
    full: bool,
}

impl Tree {
    /// Returns the state of a router with these sites and no listeners.
    #[must_use]
    pub fn new(sites: &[Site]) -> Self {
        let sites = sites
            .iter()
            .map(|kind| SiteState {
                kind: *kind,
                branches: HashMap::new(),
                growing: BinaryHeap::new(),
                changed: 0,
            })
            .collect();
        Self {
            sites,
            flows: HashMap::new(),
            sources: HashMap::new(),
            actions: VecDeque::new(),
            now: 0,
            full: false,
        }
    }

    /// Applies one change of a switch's multicast database.
    pub fn handle_change(&mut self, site: SiteIndex, change: &Change, now: u64) {
        self.now = now;
        let Some(state) = self.sites.get_mut(site) else {
            return;
        };
        let address = change.multicast_address;
        let branch = state.branches.entry(address).or_default();
        let port = branch.ports.entry(change.port).or_default();
        match (change.source, change.present) {
            (None, present) => port.any_source = present && !change.include,
            (Some(source), true) => {
                port.sources.insert(source, !change.blocked);
            }
            (Some(source), false) => {
                port.sources.remove(&source);
            }
        }
        if !port.any_source && port.sources.is_empty() {
            branch.ports.remove(&change.port);
        }
        let wanted = branch.ports.values().any(|port| !port.is_empty());
        let unused = branch.ports.is_empty();
        match (wanted, branch.since) {
            (true, None) => {
                branch.since = Some(now);
                self.log(Event::Listener {
                    site: site + 1,
                    multicast_address: address,
                });
                self.grow(site, address, now);
            }
            (false, Some(_)) => {
                branch.since = None;
                self.set_grown(site, address, false);
            }
            // The branch stays, but its sources may have changed.
            _ => self.update_routes(address),
        }
        if unused && let Some(state) = self.sites.get_mut(site) {
            state.branches.remove(&address);
        }
    }

    /// Replaces the known listeners of a site by a complete dump of its switch's database.
    pub fn handle_dump(&mut self, site: SiteIndex, dump: &[Change], now: u64) {
        let Some(state) = self.sites.get_mut(site) else {
            return;
        };
        let mut known = Vec::new();
        for (address, branch) in &state.branches {
            for (port, listener) in &branch.ports {
                let any = listener.any_source.then_some(None);
                let sources = listener.sources.keys().map(|source| Some(*source));
                known.extend(sources.chain(any).map(|source| (*address, *port, source)));
            }
        }
        for change in dump {
            known.retain(|entry| *entry != (change.multicast_address, change.port, change.source));
            self.handle_change(site, change, now);
        }
        for (multicast_address, port, source) in known {
            let gone = Change {
                port,
                multicast_address,
                source,
                blocked: false,
                include: false,
                present: false,
            };
            self.handle_change(site, &gone, now);
        }
    }

    /// Handles the kernel's upcall for a flow without a route.
    pub fn handle_flow(&mut self, flow: Flow, incoming: u16, now: u64) {
        self.now = now;
        if !self.flows.contains_key(&flow) {
            if self.flows.len() >= FLOWS_MAX {
                if !std::mem::replace(&mut self.full, true) {
                    self.log(Event::FlowsFull { flow });
                }
                return;
            }
            self.sources
                .entry(flow.multicast_address)
                .or_default()
                .push(flow.source);
            self.log(Event::Flow { flow });
        }
        let sites = self.sites_of(flow, incoming);
        self.flows.insert(
            flow,
            FlowState {
                incoming,
                sites: sites.clone(),
            },
        );
        self.actions.push_back(Action::SetRoute {
            flow,
            incoming,
            sites,
        });
    }

    /// Changes the kind of a site. A loss of multicast takes effect at once, a gain after the
    /// growth delay of the new kind.
    pub fn handle_site(&mut self, site: SiteIndex, kind: Site, now: u64) {
        self.now = now;
        let Some(state) = self.sites.get_mut(site) else {
            return;
        };
        state.kind = kind;
        state.changed = now;
        state.growing.clear();
        let addresses: Vec<(Ipv6Addr, bool)> = state
            .branches
            .iter()
            .filter(|(_, branch)| branch.since.is_some())
            .map(|(address, branch)| (*address, branch.grown))
            .collect();
        self.log(Event::Site {
            site: site + 1,
            kind,
        });
        for (address, grown) in addresses {
            match kind.growth_delay() {
                None if grown => self.set_grown(site, address, false),
                Some(_) if !grown => self.grow(site, address, now),
                _ => {}
            }
        }
    }

    /// Completes the branches whose growth delay is over.
    pub fn handle_timeout(&mut self, now: u64) {
        self.now = now;
        for site in 0..self.sites.len() {
            while let Some(address) = self.sites.get_mut(site).and_then(|state| {
                let Reverse((at, address)) = state.growing.peek().copied()?;
                (at <= now).then(|| state.growing.pop())?;
                Some(address)
            }) {
                // The branch may have been pruned and grown again since this timer was queued.
                if self.grows_at(site, address).is_some_and(|at| at <= now) {
                    self.set_grown(site, address, true);
                }
            }
        }
    }

    /// Returns when to call [`Tree::handle_timeout`] next; `None` if no timer is armed. The timer
    /// of a pruned branch stays armed.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<u64> {
        let next = |state: &SiteState| state.growing.peek().map(|Reverse((at, _))| *at);
        self.sites.iter().filter_map(next).min()
    }

    /// Returns the next action; the caller calls this function until it returns `None`.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Returns the kind of each site, in the order of sites.
    pub fn kinds(&self) -> impl Iterator<Item = Site> + '_ {
        self.sites.iter().map(|state| state.kind)
    }

    /// Returns the multicast addresses with a listener at a site, each with true if its branch is
    /// grown.
    #[must_use]
    pub fn branches(&self, site: SiteIndex) -> Vec<(Ipv6Addr, bool)> {
        let Some(state) = self.sites.get(site) else {
            return Vec::new();
        };
        let mut branches: Vec<_> = state
            .branches
            .iter()
            .filter(|(_, branch)| branch.since.is_some())
            .map(|(address, branch)| (*address, branch.grown))
            .collect();
        branches.sort_unstable();
        branches
    }

    /// Returns all flows, each with the sites that receive it.
    #[must_use]
    pub fn flows(&self) -> Vec<(Flow, Vec<SiteIndex>)> {
        let mut flows: Vec<_> = self
            .flows
            .iter()
            .map(|(flow, state)| (*flow, state.sites.clone()))
            .collect();
        flows.sort_unstable();
        flows
    }

    /// Returns when a branch is complete; `None` for never.
    fn grows_at(&self, site: SiteIndex, address: Ipv6Addr) -> Option<u64> {
        let state = self.sites.get(site)?;
        let since = state.branches.get(&address)?.since?;
        Some(since.max(state.changed) + nanoseconds(state.kind.growth_delay()?))
    }

    fn grow(&mut self, site: SiteIndex, address: Ipv6Addr, now: u64) {
        let Some(at) = self.grows_at(site, address) else {
            return;
        };
        if at <= now {
            self.set_grown(site, address, true);
        } else if let Some(state) = self.sites.get_mut(site) {
            state.growing.push(Reverse((at, address)));
        }
    }

    fn set_grown(&mut self, site: SiteIndex, address: Ipv6Addr, grown: bool) {
        let branch = self
            .sites
            .get_mut(site)
            .and_then(|state| state.branches.get_mut(&address));
        let Some(branch) = branch else { return };
        if branch.grown == grown {
            return;
        }
        branch.grown = grown;
        let site = site + 1;
        self.log(if grown {
            Event::Grown {
                site,
                multicast_address: address,
            }
        } else {
            Event::Pruned {
                site,
                multicast_address: address,
            }
        });
        self.update_routes(address);
    }

    fn update_routes(&mut self, address: Ipv6Addr) {
        for source in self.sources.get(&address).cloned().unwrap_or_default() {
            let flow = Flow {
                source,
                multicast_address: address,
            };
            let Some(incoming) = self.flows.get(&flow).map(|state| state.incoming) else {
                continue;
            };
            let sites = self.sites_of(flow, incoming);
            if let Some(state) = self.flows.get_mut(&flow)
                && state.sites != sites
            {
                state.sites.clone_from(&sites);
                self.actions.push_back(Action::SetRoute {
                    flow,
                    incoming,
                    sites,
                });
            }
        }
    }

    /// Returns the sites that want a flow and have a grown branch, except the site of the flow's
    /// source. Site `i` is behind multicast interface `i + 1`, the sender behind 0.
    fn sites_of(&self, flow: Flow, incoming: u16) -> Vec<SiteIndex> {
        (0..self.sites.len())
            .filter(|site| usize::from(incoming) != site + 1)
            .filter(|site| {
                let state = self.sites.get(*site);
                let branch = state.and_then(|state| state.branches.get(&flow.multicast_address));
                branch.is_some_and(|branch| {
                    branch.grown && branch.ports.values().any(|port| port.wants(flow.source))
                })
            })
            .collect()
    }

    fn log(&mut self, event: Event) {
        self.actions.push_back(Action::Log(LoggedEvent {
            at_ns: self.now,
            event,
        }));
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 2)
}

#[cfg(test)]
mod tests;
