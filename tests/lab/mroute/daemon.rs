//! Event loop of the routing daemon: reads upcalls, MDB changes and requests, and carries out the
//! actions of [`Tree`].

use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read as _, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use serde::{Deserialize, Serialize};

use super::control::{
    Answer, FlowStatus, Request, SiteStatus, Status, TIMEOUT, log_path, socket_path,
};
use super::event::Action;
use super::mdb::{self, Change, Read, Watch};
use super::socket::RoutingSocket;
use super::tree::Tree;
use crate::netns;
use crate::probe::clock::now_ns;
use crate::topology::Site;

/// Longest request, bytes.
const REQUEST_MAX_BYTES: u64 = 4096;

/// Settings of a router.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    /// Directory of the control socket and the event log.
    pub directory: PathBuf,
    /// Namespace of the router.
    pub namespace: String,
    /// The router's interface to the sender.
    pub sender: String,
    /// Settings of each site, in the order of site numbers.
    pub sites: Vec<SiteSettings>,
}

/// Settings of a site.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SiteSettings {
    /// The router's interface to the site.
    pub interface: String,
    /// Namespace of the access switch.
    pub switch: String,
    /// Port of the switch to the router. Reports on this port are the router's own.
    pub uplink: String,
    /// Initial kind of the site.
    pub kind: Site,
}

struct SiteWatch {
    switch: String,
    uplink: u32,
    watch: Watch,
}

struct Daemon {
    routing: RoutingSocket,
    sites: Vec<SiteWatch>,
    control: UnixListener,
    log: BufWriter<File>,
    tree: Tree,
}

/// Runs the daemon. Returns only on error.
///
/// # Errors
///
/// When an interface is missing or the kernel refuses multicast routing.
pub fn run(settings: &Settings) -> Result<()> {
    Daemon::open(settings)?.run()
}

impl Daemon {
    fn open(settings: &Settings) -> Result<Self> {
        let routing = netns::within(&settings.namespace, || -> Result<RoutingSocket> {
            let routing = RoutingSocket::open()?;
            let interfaces = std::iter::once(&settings.sender)
                .chain(settings.sites.iter().map(|site| &site.interface));
            for (mif, interface) in (0u16..).zip(interfaces) {
                let ifindex = if_nametoindex(interface.as_str())
                    .with_context(|| format!("The router has no interface {interface}"))?;
                routing.add_interface(mif, ifindex)?;
            }
            Ok(routing)
        })??;
        let mut sites = Vec::new();
        for site in &settings.sites {
            let (uplink, watch) = netns::within(&site.switch, || -> Result<(u32, Watch)> {
                let uplink = if_nametoindex(site.uplink.as_str())
                    .with_context(|| format!("{} has no port {}", site.switch, site.uplink))?;
                Ok((uplink, Watch::open()?))
            })??;
            sites.push(SiteWatch {
                switch: site.switch.clone(),
                uplink,
                watch,
            });
        }
        let log = log_path(&settings.directory);
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("Failed to open {}", log.display()))?;
        let socket = socket_path(&settings.directory);
        let control = UnixListener::bind(&socket)
            .with_context(|| format!("Failed to listen on {}", socket.display()))?;
        let kinds: Vec<Site> = settings.sites.iter().map(|site| site.kind).collect();
        let mut daemon = Self {
            routing,
            sites,
            control,
            log: BufWriter::new(log),
            tree: Tree::new(&kinds),
        };
        for site in 0..daemon.sites.len() {
            daemon.resynchronize(site)?;
        }
        Ok(daemon)
    }

    fn run(&mut self) -> Result<()> {
        loop {
            self.act()?;
            let ready = self.wait()?;
            if ready.routing {
                while let Some((flow, incoming)) = self.routing.next_upcall()? {
                    self.tree.handle_flow(flow, incoming, now_ns());
                }
            }
            for site in ready.sites {
                self.read_site(site)?;
            }
            self.tree.handle_timeout(now_ns());
            if ready.control {
                self.act()?;
                if let Ok((stream, _)) = self.control.accept()
                    && let Err(error) = self.answer(&stream)
                {
                    eprintln!("Failed to answer a request: {error:#}");
                }
            }
        }
    }

    fn wait(&self) -> Result<Ready> {
        let mut descriptors = vec![
            PollFd::new(self.routing.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.control.as_fd(), PollFlags::POLLIN),
        ];
        let watches = self.sites.iter().map(|site| site.watch.as_fd());
        descriptors.extend(watches.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let timeout = self
            .tree
            .poll_timeout()
            .map(|at| TimeSpec::from_duration(Duration::from_nanos(at.saturating_sub(now_ns()))));
        match ppoll(&mut descriptors, timeout, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno).context("Failed to wait for events"),
        }
        let mut ready = descriptors
            .iter()
            .map(|descriptor| descriptor.any().unwrap_or(false));
        Ok(Ready {
            routing: ready.next().unwrap_or(false),
            control: ready.next().unwrap_or(false),
            sites: ready
                .enumerate()
                .filter_map(|(site, ready)| ready.then_some(site))
                .collect(),
        })
    }

    fn read_site(&mut self, site: usize) -> Result<()> {
        let Some(state) = self.sites.get_mut(site) else {
            return Ok(());
        };
        match state.watch.read()? {
            Read::Overrun => self.resynchronize(site),
            Read::Changes(changes) => {
                let uplink = state.uplink;
                let now = now_ns();
                for change in changes.iter().filter(|change| change.port != uplink) {
                    self.tree.handle_change(site, change, now);
                }
                Ok(())
            }
        }
    }

    /// Reads the whole database of a site's switch, at the start and after lost notifications.
    fn resynchronize(&mut self, site: usize) -> Result<()> {
        let Some(state) = self.sites.get(site) else {
            return Ok(());
        };
        let mut dump: Vec<Change> = netns::within(&state.switch, mdb::dump)??;
        dump.retain(|change| change.port != state.uplink);
        self.tree.handle_dump(site, &dump, now_ns());
        Ok(())
    }

    fn act(&mut self) -> Result<()> {
        while let Some(action) = self.tree.poll_action() {
            match action {
                Action::SetRoute {
                    flow,
                    incoming,
                    sites,
                } => {
                    let outgoing = sites
                        .into_iter()
                        .filter_map(|site| u16::try_from(site + 1).ok());
                    self.routing.set_route(flow, incoming, outgoing)?;
                }
                Action::Log(event) => {
                    serde_json::to_writer(&mut self.log, &event)?;
                    self.log
                        .write_all(b"\n")
                        .context("Failed to write the event log")?;
                }
            }
        }
        self.log.flush().context("Failed to write the event log")
    }

    fn answer(&mut self, stream: &UnixStream) -> Result<()> {
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let mut line = String::new();
        BufReader::new(stream.take(REQUEST_MAX_BYTES)).read_line(&mut line)?;
        let answer = match serde_json::from_str(&line) {
            Err(error) => Answer::Error(format!("The request makes no sense: {error}")),
            Ok(Request::SetSite { site, .. }) if site == 0 || site > self.sites.len() => {
                Answer::Error(format!("There is no site {site}"))
            }
            Ok(Request::SetSite { site, kind }) => {
                self.tree.handle_site(site - 1, kind, now_ns());
                self.act()?;
                Answer::Status(self.status())
            }
            Ok(Request::Status) => Answer::Status(self.status()),
        };
        let mut writer = BufWriter::new(stream);
        serde_json::to_writer(&mut writer, &answer)?;
        writer.write_all(b"\n")?;
        writer.flush()?;
        Ok(())
    }

    fn status(&self) -> Status {
        let sites = self.tree.kinds().enumerate().map(|(site, kind)| {
            let branches = self.tree.branches(site);
            SiteStatus {
                site: site + 1,
                kind,
                listening: branches.iter().map(|(address, _)| *address).collect(),
                grown: branches
                    .iter()
                    .filter(|(_, grown)| *grown)
                    .map(|(a, _)| *a)
                    .collect(),
            }
        });
        let flows = self
            .tree
            .flows()
            .into_iter()
            .map(|(flow, sites)| FlowStatus {
                flow,
                sites: sites.into_iter().map(|site| site + 1).collect(),
            });
        Status {
            sites: sites.collect(),
            flows: flows.collect(),
        }
    }
}

struct Ready {
    routing: bool,
    control: bool,
    sites: Vec<usize>,
}
