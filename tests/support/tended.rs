//! The part of an agent that attaches programs to ports, driven as by its event loop.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use roamcast::clock::now;
use roamcast::datapath::{Datapath, DatapathConfig, HookView, Program};
use roamcast::proto::Port;
use roamcast::runtime::agent::hooks::{Hooks, Role};
use tokio::runtime::{Builder, Runtime};

use super::host::LIMITS;
use super::netns::DEADLINE;
use common::maps::BridgeNumber;

/// Data path and ports of an agent.
pub struct Tended {
    /// Maps and programs.
    pub datapath: Datapath,
    /// Attachment of programs to ports.
    pub hooks: Hooks,
    runtime: Runtime,
}

impl Tended {
    /// Loads the programs, and watches the ports of the calling thread's namespace.
    pub fn start(config: &DatapathConfig) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let datapath = Datapath::load(config).unwrap();
        let hooks = runtime.block_on(async { Hooks::watch(&datapath, LIMITS) });
        Self {
            datapath,
            hooks: hooks.unwrap(),
            runtime,
        }
    }

    /// Adds a port to the bridge. `is_settled` says whether libvirt shows the port's domain.
    pub fn add(&mut self, role: Role, name: &str, is_settled: bool) -> bool {
        let port = Port {
            bridge: BridgeNumber::FIRST,
            ifindex: nix::net::if_::if_nametoindex(name).unwrap(),
            name: name.to_owned(),
            mac: [0xfe, 0, 0, 0, 0, 1],
        };
        self.hooks.add(now(), role, port, is_settled)
    }

    /// Runs until a condition becomes true.
    pub fn until(&mut self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        while !condition(self) {
            assert!(
                Instant::now() < deadline,
                "timed out: {what}; {:?}",
                self.hooks.problems()
            );
            self.step();
        }
    }

    /// Runs until all programs are attached.
    pub fn until_attached(&mut self) {
        self.until("all programs attached", |agent| {
            agent.hooks.problems().is_empty()
        });
    }

    /// Handles what is due now.
    pub fn step(&mut self) {
        let bound = Duration::from_millis(10);
        let hooks = &mut self.hooks;
        let notice = self
            .runtime
            .block_on(async { tokio::time::timeout(bound, hooks.next()).await });
        if let Ok(notice) = notice {
            hooks.handle_notice(now(), notice.unwrap());
        }
        if hooks.poll_timeout().is_some_and(|due| due <= now()) {
            hooks.handle_timeout(now());
        }
    }

    /// Handles all waiting notices.
    pub fn catch_up(&mut self) {
        let bound = Duration::from_millis(10);
        let hooks = &mut self.hooks;
        while let Ok(notice) = self
            .runtime
            .block_on(async { tokio::time::timeout(bound, hooks.next()).await })
        {
            hooks.handle_notice(now(), notice.unwrap());
        }
    }

    /// Surveys all programs, as the agent does periodically.
    pub fn survey(&mut self) {
        let _entered = self.runtime.enter();
        self.hooks.survey();
    }

    /// Returns the programs of an interface as in `status`.
    pub fn views(&self, ifindex: u32) -> BTreeMap<Program, HookView> {
        views(&self.datapath, ifindex)
    }
}

/// Returns the programs of an interface as in `status`.
pub fn views(datapath: &Datapath, ifindex: u32) -> BTreeMap<Program, HookView> {
    let views = datapath
        .hooks()
        .unwrap()
        .remove(&ifindex)
        .unwrap_or_default();
    views.into_iter().map(|view| (view.program, view)).collect()
}
