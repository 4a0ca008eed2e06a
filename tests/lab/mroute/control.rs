//! Queries and changes the running routing daemon: one JSON request and one JSON answer per
//! connection, over a Unix socket.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, Shutdown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::event::{Flow, LoggedEvent};
use crate::topology::Site;

/// Timeout of each read on a connection, and of each write by the daemon.
pub(super) const TIMEOUT: Duration = Duration::from_secs(2);

/// A request to the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Asks for the state of multicast routing.
    Status,
    /// Changes the kind of a site.
    SetSite {
        /// Number of the site, 1 or 2.
        site: usize,
        /// New kind of the site.
        kind: Site,
    },
}

/// An answer of the daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The daemon refused the request, for this reason.
    Error(String),
    /// The state after the request.
    Status(Status),
}

/// State of multicast routing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// State of each site, in the order of site numbers.
    pub sites: Vec<SiteStatus>,
    /// Flows of which the router has received a packet.
    pub flows: Vec<FlowStatus>,
}

/// State of one site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteStatus {
    /// Number of the site, 1 or 2.
    pub site: usize,
    /// Current kind of the site.
    pub kind: Site,
    /// Multicast addresses with a listener there.
    pub listening: Vec<Ipv6Addr>,
    /// Addresses of `listening` whose branch is grown.
    pub grown: Vec<Ipv6Addr>,
}

/// State of one flow.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlowStatus {
    /// Source and multicast address of the flow.
    #[serde(flatten)]
    pub flow: Flow,
    /// Numbers of the sites to which the router forwards the flow.
    pub sites: Vec<usize>,
}

/// Client of the lab's routing daemon. Each request opens a connection of its own.
#[derive(Debug, Clone)]
pub struct Router {
    directory: PathBuf,
}

impl Router {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// Returns the state of multicast routing.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer.
    pub fn status(&self) -> Result<Status> {
        self.ask(&Request::Status)
    }

    /// Changes the kind of a site (1 or 2). A loss of multicast takes effect at once, a gain after
    /// the growth delay of the new kind.
    ///
    /// # Errors
    ///
    /// When there is no such site or the daemon does not answer.
    pub fn set_site(&self, site: usize, kind: Site) -> Result<()> {
        self.ask(&Request::SetSite { site, kind }).map(|_| ())
    }

    /// Returns true if packets to `multicast_address` reach a site (1 or 2), or would reach it if
    /// there were any.
    ///
    /// # Errors
    ///
    /// When the daemon does not answer.
    pub fn forwards(&self, multicast_address: Ipv6Addr, site: usize) -> Result<bool> {
        let status = self.status()?;
        let site = status.sites.iter().find(|state| state.site == site);
        Ok(site.is_some_and(|state| state.grown.contains(&multicast_address)))
    }

    /// Returns all events so far, in order.
    ///
    /// # Errors
    ///
    /// When the log cannot be read or parsed.
    pub fn events(&self) -> Result<Vec<LoggedEvent>> {
        let path = log_path(&self.directory);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("Failed to read {}", path.display()))?;
        // The daemon may be writing the last line.
        let whole = text
            .rfind('\n')
            .map_or("", |end| text.get(..end).unwrap_or_default());
        whole
            .lines()
            .map(|line| {
                serde_json::from_str(line).with_context(|| format!("Bad event log line {line:?}"))
            })
            .collect()
    }

    fn ask(&self, request: &Request) -> Result<Status> {
        let path = socket_path(&self.directory);
        let mut stream = UnixStream::connect(&path)
            .with_context(|| format!("The router does not run: {}", path.display()))?;
        stream
            .set_read_timeout(Some(TIMEOUT))
            .context("Failed to set a timeout")?;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        stream
            .write_all(&line)
            .context("Failed to ask the router")?;
        stream
            .shutdown(Shutdown::Write)
            .context("Failed to ask the router")?;
        let mut answer = String::new();
        BufReader::new(stream)
            .read_line(&mut answer)
            .context("The router does not answer")?;
        ensure!(
            !answer.is_empty(),
            "The router closed the connection without an answer"
        );
        match serde_json::from_str(&answer).context("The router's answer makes no sense")? {
            Answer::Error(reason) => bail!("{reason}"),
            Answer::Status(status) => Ok(status),
        }
    }
}

/// Returns the path of the daemon's control socket.
pub(super) fn socket_path(directory: &Path) -> PathBuf {
    directory.join("router.sock")
}

/// Returns the path of the daemon's event log, a file of JSON lines.
pub(super) fn log_path(directory: &Path) -> PathBuf {
    directory.join("router-events.jsonl")
}
