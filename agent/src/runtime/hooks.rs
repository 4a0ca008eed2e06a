//! Ports of the bridge and the programs on them: attached, and attached again when somebody has
//! taken them away.
//!
//! With TCX a program is attached at once. Without it, a TAP's programs are filters of qdiscs that
//! libvirt deletes and makes as `<bandwidth>` says, in several steps:
//!
//! ```text
//!             TAP made,      `root`, `ingress`    `htb`, `ingress`
//!             port of br0    deleted              made                      quiet
//!  libvirt  ──────┬──────────────┬────────────────────┬──────────────────────┬──▶
//!  here           │ waits        │ waits              │ filters on these     │ own qdiscs where
//!                                                                              there are none
//! ```
//!
//! libvirt deletes what is there before it makes its own, so a qdisc of ours is no hindrance, unless
//! it comes between two of these steps. So filters are put on qdiscs that are there at once, but a
//! qdisc of ours is made only when libvirt shows the domain with this TAP, which it does when it has
//! set it up, or when nobody has changed the TAP's traffic control for a second.

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

/// The ports.
pub struct Hooks {
    datapath: Datapath,
    limits: Limits,
    /// None with TCX, which nobody else's qdiscs disturb.
    notices: Option<Notices>,
    /// Interfaces that were found by [`Self::survey`].
    surveyed: (UnboundedSender<u32>, UnboundedReceiver<u32>),
    surveying: Job<()>,
    ports: BTreeMap<u32, Tended>,
    lost: u64,
}

impl Hooks {
    /// Starts to watch, in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// What netlink says.
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

    /// Waits for a change of traffic control. Can be cancelled without losing one.
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

    /// Takes a port in. `is_settled`: nobody is about to change its qdiscs. Returns whether its
    /// programs are attached.
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

    /// Forgets a port. Its programs are detached by the data path.
    pub fn remove(&mut self, ifindex: u32) {
        self.ports.remove(&ifindex);
    }

    /// The ports.
    pub fn ports(&self) -> impl Iterator<Item = &Tended> {
        self.ports.values()
    }

    /// Limits of one VM's port.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Name of a port; its index if it is none any more.
    pub fn name(&self, ifindex: u32) -> String {
        let tended = self.ports.get(&ifindex);
        tended.map_or_else(|| ifindex.to_string(), |tended| tended.port.name.clone())
    }

    /// One sentence for each port whose programs are not all attached.
    pub fn problems(&self) -> Vec<String> {
        self.ports().filter_map(Tended::problem).collect()
    }

    /// Interface indexes of the ports of a role.
    pub fn indexes(&self, role: Role) -> Vec<u32> {
        let ports = self.ports.iter().filter(|(_, tended)| tended.role == role);
        ports.map(|(ifindex, _)| *ifindex).collect()
    }

    /// Whether TAPs wait that were never attached.
    pub fn has_new(&self) -> bool {
        self.ports().any(Tended::is_new)
    }

    /// When [`Self::handle_timeout`] has something to do.
    pub fn poll_timeout(&self) -> Option<Timestamp> {
        let waiting = self.ports().filter_map(|tended| match tended.state {
            State::Waiting { until } => Some(until),
            State::Attached | State::Refused { .. } => None,
        });
        waiting.min()
    }

    /// Attaches what has waited for long enough; returns the TAPs that are attached for the first
    /// time.
    pub fn handle_timeout(&mut self, now: Timestamp) -> Vec<Port> {
        self.attach_if(
            now,
            true,
            |tended| matches!(tended.state, State::Waiting { until } if until <= now),
        )
    }

    /// The same for new TAPs of domains that are set up.
    pub fn handle_settled(
        &mut self,
        now: Timestamp,
        is_settled: impl Fn(&str) -> bool,
    ) -> Vec<Port> {
        self.attach_if(now, true, |tended| {
            tended.is_new() && is_settled(&tended.port.name)
        })
    }

    /// Traffic control has changed: looks at what is left, and puts filters on what is new. Returns
    /// as above.
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

    /// Looks at all programs on a thread for blocking work; what is lost comes as a notice.
    pub fn survey(&mut self) {
        let datapath = self.datapath.clone();
        let surveyed = self.surveyed.0.clone();
        self.surveying.start(move || match datapath.survey() {
            Ok(lost) => lost.into_iter().for_each(|ifindex| {
                // Fails when the agent ends.
                let _ = surveyed.send(ifindex);
            }),
            Err(error) => tracing::warn!(
                error = &error as &dyn Error,
                "Cannot look whether the programs are still there"
            ),
        });
    }

    /// What is counted: programs that somebody took away, and ports without all of their programs
    /// now.
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

    /// Finds what is lost on a port.
    fn look(&mut self, now: Timestamp, ifindex: u32) {
        let Some(tended) = self.ports.get_mut(&ifindex) else {
            return;
        };
        match self.datapath.lost(ifindex) {
            // Another attempt may be of use, but not at once: it changes traffic control, too.
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
            // A port can be gone before it is attached; its removal follows.
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
