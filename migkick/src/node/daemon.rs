//! I/O of the node's core: passes time, datagrams and kernel events to the core and carries out its
//! outputs.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::datapath::Datapath;
use crate::interface::Interface;
use anyhow::Context;
use common::heartbeat::Heartbeat;
use linux::random;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use sd_notify::NotifyState;

use super::config::Config;
use super::control::{Answer, Request};
use super::core::{Core, Output, Place, Saved, Timing, Used};
use super::links::Links;
use super::moving::Moving;
use super::nics::used;
use super::report::NodeStatus;
use super::server::Server;
use super::sockets::Sockets;
use super::state;
use crate::nic;

/// Interval between reads of the peers' usage.
const USAGE: Duration = Duration::from_secs(5);

/// The core with its sockets, data path and clock.
pub(super) struct Daemon {
    start: Instant,
    pub(super) config: Config,
    pub(super) core: Core,
    pub(super) datapath: Datapath,
    pub(super) links: Links,
    sockets: Sockets,
    signals: SignalFd,
    /// Timing of the notifications for systemd's watchdog.
    heartbeat: Heartbeat,
    /// NICs that the node uses.
    pub(super) interfaces: Vec<Interface>,
    pub(super) multicast: Option<u32>,
    pub(super) moving: Option<Moving>,
    /// Addresses of other nodes, found by duplicate address detection.
    pub(super) taken: BTreeSet<Ipv6Addr>,
    /// Networks that a NIC has left: its index and its former address.
    pub(super) abandoned: Vec<(u32, Ipv6Addr)>,
    next_usage: Duration,
    stop: Option<Stop>,
    said: String,
}

/// What happens to the data path at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    /// Leave the data path at work.
    Leave,
    /// Remove the data path.
    Detach,
}

/// Runs the node until a signal or `migkick node stop`.
pub(super) fn run(config: Config, socket: &Path, detach: bool) -> anyhow::Result<()> {
    let mut server = Server::open(socket).with_context(|| {
        format!(
            "Cannot open {}; run migkick as root, and only one node",
            socket.display()
        )
    })?;
    let mut daemon = Daemon::start(config)?;
    // Outside systemd the notification fails, which does no harm.
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    while daemon.stop.is_none() {
        daemon.turn(&mut server)?;
    }
    let detach = detach || daemon.stop == Some(Stop::Detach);
    // Dropping an unfinished migration undoes it.
    daemon.moving = None;
    if detach {
        daemon
            .datapath
            .detach()
            .context("Cannot take the data path away")?;
    }
    Ok(())
}

impl Daemon {
    fn start(config: Config) -> anyhow::Result<Self> {
        let start = Instant::now();
        let mut links = Links::open().context("Cannot open a netlink socket")?;
        let interfaces = used(&config, links.interfaces().context("Cannot list the NICs")?);
        let epoch_ms = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis();
        let identity = &config.identity;
        let datapath = Datapath::attach(identity.hoa, identity.home, &interfaces)?;
        let timing = Timing {
            lifetime: config.lifetime,
            forward: config.forward,
            ..Timing::default()
        };
        let mut stop = SigSet::empty();
        stop.add(Signal::SIGINT);
        stop.add(Signal::SIGTERM);
        stop.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let mut daemon = Self {
            start,
            core: Core::new(
                identity.clone(),
                timing,
                state::load(&config.state),
                u64::try_from(epoch_ms).unwrap_or(u64::MAX),
                random::entropy(),
            ),
            datapath,
            links,
            sockets: Sockets::default(),
            signals: SignalFd::with_flags(&stop, flags)?,
            heartbeat: Heartbeat::new(sd_notify::watchdog_enabled()),
            multicast: interfaces.first().map(|it| it.ifindex),
            interfaces,
            moving: None,
            taken: BTreeSet::new(),
            abandoned: Vec::new(),
            next_usage: Duration::ZERO,
            stop: None,
            said: String::new(),
            config,
        };
        daemon.nics_changed()?;
        Ok(daemon)
    }

    pub(super) fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// One round: carry out outputs, wait, handle inputs.
    fn turn(&mut self, server: &mut Server) -> anyhow::Result<()> {
        self.flush();
        self.beat();
        self.wait(server)?;
        if let Ok(Some(_)) = self.signals.read_signal() {
            self.stop = Some(Stop::Leave);
        }
        let changes = self.links.take();
        if changes.announced {
            let now = self.now();
            self.core.handle_announcement(now);
            self.flush();
            self.report_memberships();
        }
        if self.moving.as_mut().is_some_and(Moving::is_answered) {
            let now = self.now();
            self.core.handle_hint(now);
        }
        for received in self.sockets.receive() {
            let now = self.now();
            self.core.handle_datagram(now, received);
        }
        for held in self.datapath.take_held() {
            let now = self.now();
            self.core.handle_held(now, held.peer, held.frame);
        }
        if changes.changed {
            self.nics_changed()?;
        }
        let now = self.now();
        server.serve(now, |request| self.handle(request));
        self.core.handle_timeout(now);
        if now >= self.next_usage {
            self.next_usage = now + USAGE;
            self.look_at_usage(now);
        }
        let is_over = self
            .moving
            .as_mut()
            .is_some_and(|it| it.handle_timeout(now));
        if is_over {
            self.say("Nothing has been heard of the move for too long; it is off");
            self.abort(false);
        }
        Ok(())
    }

    /// Notifies systemd's watchdog when due.
    fn beat(&mut self) {
        let now = self.now();
        if self.heartbeat.is_due(now)
            && let Err(error) = sd_notify::notify(&[NotifyState::Watchdog])
        {
            self.say(&format!(
                "systemd's watchdog cannot be told that all is well: {error}"
            ));
        }
    }

    fn wait(&self, server: &Server) -> anyhow::Result<()> {
        let mut fds: Vec<PollFd<'_>> = vec![
            readable(self.signals.as_fd()),
            readable(self.links.fd()),
            readable(self.datapath.held_fd()),
        ];
        fds.extend(self.sockets.fds().map(readable));
        fds.extend(self.moving.iter().filter_map(Moving::fd).map(readable));
        fds.extend(server.fds().map(|(fd, writes)| {
            let flags = if writes {
                PollFlags::POLLOUT
            } else {
                PollFlags::POLLIN
            };
            PollFd::new(fd, flags)
        }));
        let times = [
            self.core.poll_timeout(),
            server.poll_timeout(),
            self.moving.as_ref().map(Moving::poll_timeout),
            self.heartbeat.poll_timeout(),
            Some(self.next_usage),
        ];
        let next = times.into_iter().flatten().min().unwrap_or(Duration::MAX);
        // Rounded up: the last fraction of a millisecond would become a busy loop.
        let patience = next.saturating_sub(self.now()) + Duration::from_micros(999);
        let patience = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, patience) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error).context("Cannot wait for events"),
        }
    }

    fn handle(&mut self, request: Request) -> Answer {
        let answer = match request {
            Request::Status => Answer::Status(Box::new(NodeStatus::new(
                self.core.status(self.now()),
                &self.interfaces,
                self.datapath.counters().unwrap_or_default(),
            ))),
            Request::Prepare(prepare) => match self.prepare(&prepare) {
                Ok(prepared) => Answer::Prepared(prepared),
                Err(error) => Answer::Error(format!("{error:#}")),
            },
            Request::Known if self.moving.as_ref().is_some_and(|it| it.is_taken) => Answer::Taken,
            Request::Known => Answer::Known(self.core.is_known(self.now())),
            Request::Ready { near } => Answer::Ready {
                translate: self.ready(near),
            },
            Request::Aborted { taken } => {
                self.abort(taken);
                Answer::Done
            }
            Request::Lost => {
                self.lost();
                Answer::Done
            }
            Request::Completed => {
                let now = self.now();
                self.core.handle_hint(now);
                Answer::Done
            }
            Request::Stop => {
                self.stop = Some(Stop::Detach);
                Answer::Done
            }
        };
        self.flush();
        answer
    }

    /// Carries out the core's outputs. Logs failures; the core repeats the output.
    pub(super) fn flush(&mut self) {
        while let Some(output) = self.core.poll_output() {
            if let Err(error) = self.perform(output) {
                self.say(&format!("{error:#}"));
            }
        }
    }

    fn perform(&mut self, output: Output) -> anyhow::Result<()> {
        match output {
            // The core repeats a message that cannot be sent now.
            Output::Transmit { from, to, bytes } => {
                let _ = self.sockets.send(from, to, &bytes);
            }
            Output::SetActive(place) => self.set_active(place)?,
            Output::SetOwn(places) => {
                let moas: Vec<Ipv6Addr> = places.iter().map(|it| it.moa).collect();
                self.datapath.set_own(&moas)?;
                self.sockets.set(&places);
            }
            Output::SetPeer { hoa, to, from } => self.datapath.set_peer(hoa, to, &from)?,
            Output::HoldPeer { hoa, from } => self.datapath.hold_peer(hoa, &from)?,
            Output::RemovePeer(hoa) => self.datapath.remove_peer(hoa)?,
            Output::Release(frame) => self.datapath.release(&frame)?,
            Output::Refuse(frame) => self.datapath.refuse(&frame)?,
            Output::PathChanged => self.datapath.path_changed()?,
            Output::Join => {
                let errors = self.moving.as_mut().map(Moving::join);
                for error in errors.unwrap_or_default() {
                    self.say(&format!("{:#}", anyhow::Error::new(error)));
                }
            }
            Output::Leave(place) => {
                self.abandoned.push((place.ifindex, place.moa));
                nic::leave(self.links.netlink(), place.ifindex, place.moa)
                    .context("Cannot remove the routes of the network that was left")?;
            }
            Output::RemoveAddress(place) => self.remove_address(place)?,
            Output::Replace(place) => self.replace(place)?,
            Output::Save(saved) => self.save(saved)?,
        }
        Ok(())
    }

    fn set_active(&mut self, place: Place) -> anyhow::Result<()> {
        let interfaces = &self.interfaces;
        if let Some(nic) = interfaces.iter().find(|it| it.ifindex == place.ifindex) {
            self.datapath.set_active(nic, place.moa)?;
        }
        if let Some(moving) = self.moving.take_if(|it| it.address() == place.moa) {
            self.abandoned.retain(|it| it.0 != place.ifindex);
            for error in moving.settle() {
                self.say(&format!("{:#}", anyhow::Error::new(error)));
            }
            self.datapath.forget_plan()?;
            self.report_memberships();
        }
        Ok(())
    }

    /// Handles the arrival of the VM: announces the memberships of `mat0` before the network
    /// queries them. The kernel repeats the Report, so a lost Report does no harm.
    fn report_memberships(&mut self) {
        if let Err(error) = self.datapath.report_memberships() {
            self.say(&format!(
                "Cannot have the memberships of mat0 reported: {error}"
            ));
        }
    }

    fn save(&mut self, saved: Saved) -> anyhow::Result<()> {
        let path = &self.config.state;
        state::save(path, saved).with_context(|| format!("Cannot write {}", path.display()))
    }

    /// Logs a message, once.
    pub(super) fn say(&mut self, text: &str) {
        if self.said != text {
            eprintln!("{text}");
            text.clone_into(&mut self.said);
        }
    }

    fn look_at_usage(&mut self, now: Duration) {
        let used = |(hoa, usage): (Ipv6Addr, crate::datapath::Usage)| {
            let used = Used {
                packets: usage.packets,
                bytes: usage.bytes,
                idle: usage.idle,
            };
            (hoa, used)
        };
        match self.datapath.peers_used() {
            Ok(peers) => {
                let peers: Vec<_> = peers.into_iter().map(used).collect();
                self.core.handle_usage(now, &peers);
            }
            Err(error) => self.say(&format!("{:#}", anyhow::Error::new(error))),
        }
    }
}

fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}
