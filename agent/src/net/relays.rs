//! Discovery of relays: from a list, from the addresses of a DNS name, and from session
//! descriptions.
//!
//! A task reads each [`Source`] periodically. [`Discovery::next`] returns the union of the latest
//! results whenever the union changes. A source that fails keeps its previous result and reports
//! the failure in one sentence.
//!
//! A session description (RFC 8866) names relays by a private attribute, at session or media level:
//!
//! ```text
//! a=x-roamcast-relay:relay1.example 2001:db8:9::1
//! a=x-roamcast-relay:relay2.example [2001:db8:9::2]:47411
//! ```
//!
//! The certificate proves that a relay is genuine, not the description; plain `http` therefore
//! suffices.

use std::collections::BTreeSet;
use std::io::Read as _;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hickory_resolver::{TokioResolver, lookup::Ipv6Lookup};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::value::PeerAddress;

/// Bounds of the interval between DNS queries; within them the TTL of the records decides.
const DNS_INTERVAL: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(300)];
/// Pause after a failed read of a source.
const RETRY: Duration = Duration::from_secs(15);
/// Interval between reads of a session description.
const SDP_INTERVAL: Duration = Duration::from_secs(60);
/// Total time limit of one HTTP request.
const HTTP_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest session description accepted, bytes.
const MAX_SDP_BYTES: u64 = 64 * 1024;
/// Most relays accepted from one source; further ones are ignored.
const MAX_RELAYS: usize = 32;
/// Prefix of the attribute line that names a relay.
const ATTRIBUTE: &str = "a=x-roamcast-relay:";

/// One place to look for relays.
#[derive(Clone, Debug)]
pub enum Source {
    /// Names and addresses in the configuration.
    Listed {
        /// Configuration key of the list; appears as [`FoundRelay::found_by`].
        key: &'static str,
        /// (DNS name in the certificate, address) of each relay.
        relays: Vec<(String, String)>,
    },
    /// Each IPv6 address of a DNS name is a relay.
    Dns {
        /// Name to resolve (AAAA records); always taken as fully qualified.
        host: String,
        /// TCP port of every relay found by this name.
        port: u16,
        /// DNS name in the certificates of these relays.
        name: String,
    },
    /// A session description in a file.
    SdpFile(PathBuf),
    /// A session description at an `http://` URL.
    SdpUrl(String),
}

/// A relay of a [`Source`] or of a migration control server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundRelay {
    /// `name@address` in lower case, the unique name of the connection to the relay.
    pub id: String,
    /// DNS name in the relay's certificate, lower case.
    pub name: String,
    /// `host:port` to dial, or only `host` for the default port.
    pub address: String,
    /// The source: a configuration key, `dns HOST`, `sdp PLACE`, or `mcs`.
    pub found_by: String,
}

/// Latest results of all sources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Without duplicates: a relay of two sources is listed for the first one.
    pub relays: Vec<FoundRelay>,
    /// One sentence for each failing source.
    pub problems: Vec<String>,
}

/// Why a source yields no relays.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error("Relay name {host} cannot be resolved: {reason}")]
    Dns { host: String, reason: String },
    #[error("Relay name {host} does not exist in DNS, or has no IPv6 address")]
    NoAddress { host: String },
    #[error("Session description {place} cannot be read: {reason}")]
    Sdp { place: String, reason: String },
    #[error("Session description {place} names no relay ({ATTRIBUTE}NAME ADDRESS)")]
    NoRelay { place: String },
    #[error("Session description {place}, line {line}: write {ATTRIBUTE}NAME ADDRESS")]
    Attribute { place: String, line: usize },
}

/// (DNS name in the certificate, address)
type Named = (String, String);
pub(crate) type Looked = Result<Vec<Named>, SourceError>;

/// Runs the discovery. Dropping the value stops it.
#[derive(Debug)]
pub struct Discovery {
    looks: mpsc::Receiver<(usize, Looked)>,
    labels: Vec<String>,
    found: Vec<Vec<Named>>,
    problems: Vec<Option<String>>,
    /// Latest relays of the migration control server.
    told: Vec<Named>,
    last: Option<Found>,
    _stop: DropGuard,
}

impl Discovery {
    /// Starts one task per source. Must be called in a tokio runtime.
    pub fn start(sources: Vec<Source>) -> Self {
        let (sender, looks) = mpsc::channel(sources.len().max(1));
        let stop = CancellationToken::new();
        let count = sources.len();
        let labels = sources.iter().map(Source::label).collect();
        for (index, source) in sources.into_iter().enumerate() {
            let (sender, stop) = (sender.clone(), stop.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = watch(index, source, sender) => {}
                }
            });
        }
        Self {
            looks,
            labels,
            found: vec![Vec::new(); count],
            problems: vec![None; count],
            told: Vec::new(),
            last: None,
            _stop: stop.drop_guard(),
        }
    }

    /// Waits until the union of all results changes; never returns without a source. Cancel safe.
    pub async fn next(&mut self) -> Found {
        loop {
            let Some((index, looked)) = self.looks.recv().await else {
                return std::future::pending().await;
            };
            match looked {
                Ok(relays) => {
                    self.found[index] = relays;
                    self.problems[index] = None;
                }
                Err(error) => {
                    let problem = error.to_string();
                    if self.problems[index].as_ref() != Some(&problem) {
                        tracing::warn!("{problem}");
                    }
                    self.problems[index] = Some(problem);
                }
            }
            if let Some(found) = self.changed() {
                return found;
            }
        }
    }

    /// Replaces the relays of the migration control server by this complete list. Returns the new
    /// union if it changed.
    pub fn tell(&mut self, relays: Vec<(String, String)>) -> Option<Found> {
        self.told = relays;
        self.changed()
    }

    fn changed(&mut self) -> Option<Found> {
        let found = self.merge();
        if self.last.as_ref() == Some(&found) {
            return None;
        }
        self.last = Some(found.clone());
        Some(found)
    }

    fn merge(&self) -> Found {
        let all = || {
            let sources = self.found.iter().zip(&self.labels);
            sources
                .flat_map(|(found, label)| found.iter().map(move |named| (named, label.as_str())))
                .chain(self.told.iter().map(|named| (named, "mcs")))
        };
        let mut seen = BTreeSet::new();
        let relays = all()
            .filter(|(named, _)| seen.insert((*named).clone()))
            .map(|((name, address), label)| {
                let name = name.to_ascii_lowercase();
                FoundRelay {
                    id: format!("{name}@{}", address.to_ascii_lowercase()),
                    name,
                    address: address.clone(),
                    found_by: label.to_owned(),
                }
            })
            .collect();
        let problems = self.problems.iter().flatten().cloned().collect();
        Found { relays, problems }
    }
}

impl Source {
    fn label(&self) -> String {
        match self {
            Self::Listed { key, .. } => (*key).to_owned(),
            Self::Dns { host, .. } => format!("dns {host}"),
            Self::SdpFile(path) => format!("sdp {}", path.display()),
            Self::SdpUrl(url) => format!("sdp {url}"),
        }
    }
}

/// Reads a source periodically and sends each result.
async fn watch(index: usize, source: Source, sender: mpsc::Sender<(usize, Looked)>) {
    let mut resolver = None;
    loop {
        let (looked, next) = look(&source, &mut resolver).await;
        let next = if looked.is_err() { Some(RETRY) } else { next };
        if sender.send((index, looked)).await.is_err() {
            return;
        }
        match next {
            Some(next) => sleep(next).await,
            // The source never changes. The task stays so that the channel stays open.
            None => return std::future::pending().await,
        }
    }
}

/// Reads a source once. Returns its relays and the time until the next read; `None` means never.
async fn look(source: &Source, resolver: &mut Option<TokioResolver>) -> (Looked, Option<Duration>) {
    match source {
        Source::Listed { relays, .. } => (Ok(relays.clone()), None),
        Source::Dns { host, port, name } => match resolve(host, resolver).await {
            Ok(lookup) => {
                let wait = lookup
                    .valid_until()
                    .saturating_duration_since(Instant::now());
                let wait = wait.clamp(DNS_INTERVAL[0], DNS_INTERVAL[1]);
                (named_addresses(host, name, *port, &lookup), Some(wait))
            }
            Err(error) => (Err(error), None),
        },
        Source::SdpFile(path) => {
            let looked = read_file(path).await;
            let place = path.display().to_string();
            (
                looked.and_then(|text| parse(&text, &place)),
                Some(SDP_INTERVAL),
            )
        }
        Source::SdpUrl(url) => {
            let looked = read_url(url).await;
            (
                looked.and_then(|text| parse(&text, url)),
                Some(SDP_INTERVAL),
            )
        }
    }
}

async fn resolve(
    host: &str,
    resolver: &mut Option<TokioResolver>,
) -> Result<Ipv6Lookup, SourceError> {
    let failed = |reason: String| SourceError::Dns {
        host: host.to_owned(),
        reason,
    };
    if resolver.is_none() {
        let builder = TokioResolver::builder_tokio().map_err(|error| failed(error.to_string()))?;
        *resolver = Some(builder.build());
    }
    let Some(resolver) = resolver else {
        return Err(failed("no resolver".to_owned()));
    };
    let host = host.trim_end_matches('.');
    resolver
        .ipv6_lookup(format!("{host}."))
        .await
        .map_err(|error| match error.is_no_records_found() {
            true => SourceError::NoAddress {
                host: host.to_owned(),
            },
            false => failed(error.to_string()),
        })
}

fn named_addresses(host: &str, name: &str, port: u16, lookup: &Ipv6Lookup) -> Looked {
    // Sorted, so that a different record order does not count as a change.
    let addresses: BTreeSet<Ipv6Addr> = lookup.iter().map(|record| record.0).collect();
    if addresses.is_empty() {
        let host = host.to_owned();
        return Err(SourceError::NoAddress { host });
    }
    let named = |address| {
        let address = SocketAddrV6::new(address, port, 0, 0);
        (name.to_owned(), address.to_string())
    };
    Ok(addresses.into_iter().take(MAX_RELAYS).map(named).collect())
}

async fn read_file(path: &Path) -> Result<String, SourceError> {
    let owned = path.to_owned();
    blocking(path.display().to_string(), move || {
        let file = std::fs::File::open(owned).map_err(|error| error.to_string())?;
        bounded(file)
    })
    .await
}

async fn read_url(url: &str) -> Result<String, SourceError> {
    let owned = url.to_owned();
    blocking(url.to_owned(), move || {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_global(Some(HTTP_TIMEOUT))
            .build()
            .into();
        let mut response = agent.get(owned).call().map_err(|error| error.to_string())?;
        bounded(response.body_mut().as_reader())
    })
    .await
}

/// Reads a text; fails if it is longer than [`MAX_SDP_BYTES`].
fn bounded(reader: impl std::io::Read) -> Result<String, String> {
    let mut text = String::new();
    reader
        .take(MAX_SDP_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|error| error.to_string())?;
    if text.len() as u64 > MAX_SDP_BYTES {
        return Err(format!("it has more than {MAX_SDP_BYTES} bytes"));
    }
    Ok(text)
}

async fn blocking(
    place: String,
    read: impl FnOnce() -> Result<String, String> + Send + 'static,
) -> Result<String, SourceError> {
    let read = tokio::task::spawn_blocking(read).await;
    read.unwrap_or_else(|error| Err(error.to_string()))
        .map_err(|reason| SourceError::Sdp { place, reason })
}

/// Returns the relays that a session description names.
pub(crate) fn parse(text: &str, place: &str) -> Looked {
    let mut relays = Vec::new();
    for (line, text) in text.lines().enumerate() {
        let Some(value) = text.trim_end().strip_prefix(ATTRIBUTE) else {
            continue;
        };
        let (name, address) = value
            .split_once(' ')
            .and_then(|(name, address)| {
                let address = PeerAddress::try_from(address.trim().to_owned()).ok()?;
                rustls_pki_types::DnsName::try_from(name).ok()?;
                Some((name.to_owned(), address.to_string()))
            })
            .ok_or_else(|| SourceError::Attribute {
                place: place.to_owned(),
                line: line + 1,
            })?;
        if relays.len() < MAX_RELAYS {
            relays.push((name, address));
        }
    }
    if relays.is_empty() {
        let place = place.to_owned();
        return Err(SourceError::NoRelay { place });
    }
    Ok(relays)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(relays: &[(&str, &str)]) -> Source {
        Source::Listed {
            key: "servers",
            relays: relays
                .iter()
                .map(|(name, address)| ((*name).to_owned(), (*address).to_owned()))
                .collect(),
        }
    }

    #[tokio::test]
    async fn listed_relays_are_found_at_once_and_once() {
        let mut discovery = Discovery::start(vec![listed(&[
            ("Relay1", "[2001:db8::1]:47411"),
            ("relay2", "r2:5"),
        ])]);
        let found = discovery.next().await;
        let ids: Vec<_> = found.relays.iter().map(|relay| relay.id.as_str()).collect();
        assert_eq!(ids, ["relay1@[2001:db8::1]:47411", "relay2@r2:5"]);
        assert_eq!(found.relays[0].name, "relay1");
        assert!(found.problems.is_empty());
    }

    #[tokio::test]
    async fn source_that_fails_is_named_and_the_others_go_on() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing.sdp");
        let mut discovery = Discovery::start(vec![
            Source::SdpFile(missing),
            listed(&[("relay1", "[2001:db8::1]:47411")]),
        ]);
        let mut found = discovery.next().await;
        while found.relays.is_empty() || found.problems.is_empty() {
            found = discovery.next().await;
        }
        assert_eq!(found.relays.len(), 1);
        let [problem] = found.problems.as_slice() else {
            panic!("{found:?}");
        };
        assert!(
            problem.contains("missing.sdp cannot be read: No such file"),
            "{problem}"
        );
    }

    #[tokio::test]
    async fn session_description_is_read_from_a_file_and_by_http() {
        let text =
            "v=0\r\no=- 1 1 IN IP6 ::1\r\ns=tv\r\na=x-roamcast-relay:r1.example 2001:db8::1\r\n";
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tv.sdp");
        std::fs::write(&path, text).unwrap();
        let listener = std::net::TcpListener::bind("[::1]:0").unwrap();
        let url = format!("http://{}/tv.sdp", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            use std::io::Write as _;
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).unwrap();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{text}",
                text.len()
            )
            .unwrap();
        });
        for source in [Source::SdpFile(path), Source::SdpUrl(url)] {
            let found = Discovery::start(vec![source]).next().await;
            assert_eq!(found.problems, Vec::<String>::new());
            assert_eq!(found.relays[0].id, "r1.example@[2001:db8::1]:47411");
        }
    }

    #[test]
    fn bad_session_descriptions_are_refused_with_their_line() {
        let error = |text: &str| parse(text, "x.sdp").unwrap_err().to_string();
        assert!(error("v=0\n").contains("names no relay"));
        for bad in ["r1", "r1 [::1", "r_/ ::1", " ::1"] {
            let error = error(&format!("v=0\na=x-roamcast-relay:{bad}\n"));
            assert!(
                error.starts_with("Session description x.sdp, line 2: "),
                "{error}"
            );
        }
    }
}
