//! The bridge's ports and their programs: attaches the programs, and attaches them again after
//! somebody has removed them.
//!
//! With TCX the agent attaches a program at once. Without TCX the programs of a TAP are tc filters,
//! and a filter needs a qdisc. libvirt deletes the TAP's qdiscs and creates its own in several
//! steps, as the domain's `<bandwidth>` says:
//!
//! ```text
//!             TAP made,      `root`, `ingress`    `htb`, `ingress`
//!             port of br0    deleted              made                      quiet
//!  libvirt  ──────┬──────────────┬────────────────────┬──────────────────────┬──▶
//!  agent          │ waits        │ waits              │ filters on these     │ own qdiscs where
//!                                                                              there are none
//! ```
//!
//! libvirt deletes existing qdiscs before it creates its own, so a qdisc of the agent disturbs
//! libvirt only between these two steps. The agent therefore puts filters on existing qdiscs at
//! once. It creates a missing qdisc only when the TAP is settled: libvirt shows a domain with the
//! TAP (libvirt has then set it up), or the TAP's traffic control has not changed for a second.

mod tended;

use std::collections::BTreeMap;
use std::error::Error;
use std::io;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::datapath::{Datapath, Hook, Limits};
use crate::job::Job;
use crate::net::tc::{Notice, Notices};
use crate::proto::{Port, Timestamp};

pub use tended::{Role, State, Tended};

/// Ports of the bridge, and the state of the programs on each.
pub struct Hooks {
    datapath: Datapath,
    limits: Limits,
    /// `None` with TCX: changes of qdiscs do not affect TCX programs.
    notices: Option<Notices>,
    /// Interfaces on which [`Self::survey`] found a program missing.
    surveyed: (UnboundedSender<u32>, UnboundedReceiver<u32>),
    surveying: Job<()>,
    ports: BTreeMap<u32, Tended>,
    lost: u64,
}

impl Hooks {
    /// Begins to watch traffic control in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// The error of netlink.
    pub fn watch(datapath: &Datapath, limits: Limits) -> io::Result<Self> {
        let notices = match datapath.hook() {
            Hook::Filter => Some(Notices::watch()?),
            _ => None,
        };
        Ok(Self {
            datapath: datapath.clone(),
            limits,
            notices,
            surveyed: unbounded_channel(),
            surveying: Job::default(),
            ports: BTreeMap::new(),
            lost: 0,
        })
    }

    /// Waits for a change of traffic control. Cancel safe: no change is lost.
    pub async fn next(&mut self) -> io::Result<Notice> {
        let notice = async {
            match &mut self.notices {
                Some(notices) => notices.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            notice = notice => notice,
            Some(ifindex) = self.surveyed.1.recv() => Ok(Notice::Interface(ifindex)),
        }
    }

    /// Adds a port. `is_settled`: nobody is about to change the port's qdiscs. Returns true if the
    /// port's programs are attached.
    pub fn add(&mut self, now: Timestamp, role: Role, port: Port, is_settled: bool) -> bool {
        let ifindex = port.ifindex;
        let tended = self.ports.entry(ifindex).or_insert_with(|| Tended {
            role,
            port: port.clone(),
            state: State::Waiting { until: now },
            was_attached: false,
            losses: 0,
            attached_at: now,
        });
        tended.port = port;
        if tended.state != State::Attached {
            self.attach(now, ifindex, is_settled);
        }
        self.is_attached(ifindex)
    }

    /// Removes a port. The datapath detaches the programs.
    pub fn remove(&mut self, ifindex: u32) {
        self.ports.remove(&ifindex);
    }

    /// Returns all ports, in the order of their interface indexes.
    pub fn ports(&self) -> impl Iterator<Item = &Tended> {
        self.ports.values()
    }

    /// Returns the limits for the port of one VM.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Returns the name of a port, or its index if the port no longer exists.
    pub fn name(&self, ifindex: u32) -> String {
        let tended = self.ports.get(&ifindex);
        tended.map_or_else(|| ifindex.to_string(), |tended| tended.port.name.clone())
    }

    /// Returns one sentence for each port whose programs are not all attached.
    pub fn problems(&self) -> Vec<String> {
        self.ports().filter_map(Tended::problem).collect()
    }

    /// Returns the interface indexes of the ports with a role.
    pub fn indexes(&self, role: Role) -> Vec<u32> {
        let ports = self.ports.iter().filter(|(_, tended)| tended.role == role);
        ports.map(|(ifindex, _)| *ifindex).collect()
    }

    /// Returns true if a TAP waits for its first attachment.
    pub fn has_new(&self) -> bool {
        self.ports().any(Tended::is_new)
    }

    /// Returns when to call [`Self::handle_timeout`].
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let waiting = self.ports().filter_map(|tended| match tended.state {
            State::Waiting { until } => Some(until),
            State::Attached | State::Refused { .. } => None,
        });
        waiting.min()
    }

    /// Attaches programs whose waiting time is over. Returns the TAPs attached for the first time.
    pub fn handle_timeout(&mut self, now: Timestamp) -> Vec<Port> {
        self.attach_if(
            now,
            true,
            |tended| matches!(tended.state, State::Waiting { until } if until <= now),
        )
    }

    /// Attaches the programs of new TAPs whose domains are set up. Returns the TAPs attached for
    /// the first time.
    pub fn handle_settled(
        &mut self,
        now: Timestamp,
        is_settled: impl Fn(&str) -> bool,
    ) -> Vec<Port> {
        self.attach_if(now, true, |tended| {
            tended.is_new() && is_settled(&tended.port.name)
        })
    }

    /// Handles a change of traffic control: finds lost programs and puts filters on new qdiscs.
    /// Returns the TAPs attached for the first time.
    pub fn handle_notice(&mut self, now: Timestamp, notice: Notice) -> Vec<Port> {
        let concerned: Vec<u32> = match notice {
            Notice::Interface(ifindex) => vec![ifindex],
            Notice::Lost => self.ports.keys().copied().collect(),
        };
        for ifindex in &concerned {
            self.look(now, *ifindex);
        }
        self.attach_if(now, false, |tended| {
            concerned.contains(&tended.port.ifindex)
                && matches!(tended.state, State::Waiting { .. })
        })
    }

    /// Checks all programs on a thread for blocking work. A lost program arrives as a notice.
    pub fn survey(&mut self) {
        let datapath = self.datapath.clone();
        let surveyed = self.surveyed.0.clone();
        self.surveying.start(move || match datapath.survey() {
            Ok(lost) => lost.into_iter().for_each(|ifindex| {
                // The send fails if the agent is ending.
                let _ = surveyed.send(ifindex);
            }),
            Err(error) => tracing::warn!(
                error = &error as &dyn Error,
                "Cannot look whether the programs are still there"
            ),
        });
    }

    /// Returns the counters: programs removed by somebody else, and ports that currently lack a
    /// program.
    pub fn counters(&self) -> [(&'static str, u64); 3] {
        let count = |is: fn(&State) -> bool| {
            let ports = self.ports().filter(|tended| is(&tended.state));
            u64::try_from(ports.count()).unwrap_or(u64::MAX)
        };
        [
            ("programs_taken_away", self.lost),
            (
                "ports_waiting",
                count(|it| matches!(it, State::Waiting { .. })),
            ),
            (
                "ports_refused",
                count(|it| matches!(it, State::Refused { .. })),
            ),
        ]
    }

    fn is_attached(&self, ifindex: u32) -> bool {
        let tended = self.ports.get(&ifindex);
        tended.is_some_and(|tended| tended.state == State::Attached)
    }

    fn attach_if(
        &mut self,
        now: Timestamp,
        is_settled: bool,
        concerns: impl Fn(&Tended) -> bool,
    ) -> Vec<Port> {
        let concerned = self.ports().filter(|tended| concerns(tended));
        let concerned: Vec<(u32, bool)> = concerned
            .map(|tended| (tended.port.ifindex, tended.is_new()))
            .collect();
        let mut attached = Vec::new();
        for (ifindex, is_new) in concerned {
            self.attach(now, ifindex, is_settled);
            let tended = self.ports.get(&ifindex);
            attached.extend(
                tended
                    .filter(|tended| is_new && tended.state == State::Attached)
                    .map(|tended| tended.port.clone()),
            );
        }
        attached
    }

    /// Finds the programs that a port has lost.
    fn look(&mut self, now: Timestamp, ifindex: u32) {
        let Some(tended) = self.ports.get_mut(&ifindex) else {
            return;
        };
        match self.datapath.lost(ifindex) {
            // Another attempt may succeed, but not at once: the attempt changes traffic control
            // too.
            Ok(lost) if lost.is_empty() => {
                if matches!(tended.state, State::Refused { .. }) {
                    tended.lose(now);
                }
            }
            Ok(lost) => {
                let names: Vec<_> = lost.iter().map(|program| program.name()).collect();
                tracing::warn!(
                    port = tended.port.name,
                    programs = names.join(", "),
                    "Somebody has taken programs off a port; attaching again"
                );
                self.lost += u64::try_from(lost.len()).unwrap_or(u64::MAX);
                tended.lose(now);
            }
            Err(error) => tracing::warn!(
                port = tended.port.name,
                error = &error as &dyn Error,
                "Cannot look whether the programs are still there"
            ),
        }
    }

    fn attach(&mut self, now: Timestamp, ifindex: u32, is_settled: bool) {
        let Some(tended) = self.ports.get_mut(&ifindex) else {
            return;
        };
        let waiting = State::Waiting {
            until: now + tended.quiet(),
        };
        let was_attached = tended.was_attached;
        tended.state = match tended.attached(&self.datapath, &self.limits, is_settled) {
            Ok(Some(adopted)) => {
                tracing::info!(
                    port = tended.port.name,
                    ifindex,
                    adopted,
                    again = was_attached,
                    "{} added",
                    tended.role.as_str()
                );
                tended.was_attached = true;
                tended.attached_at = now;
                State::Attached
            }
            Ok(None) => {
                tracing::debug!(port = tended.port.name, "Programs wait for quiet qdiscs");
                waiting
            }
            // The port may be gone before its programs are attached; its removal event follows.
            Err(error) => {
                tracing::error!(
                    port = tended.port.name,
                    error = &error as &dyn Error,
                    "{}",
                    tended.role.refusal()
                );
                State::Refused {
                    reason: error.to_string(),
                }
            }
        };
    }
}
