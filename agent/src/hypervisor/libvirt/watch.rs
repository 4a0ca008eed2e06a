//! The watching thread: connects to libvirtd, lists domains and handles events.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use common::backoff::Backoff;
use virt::connect::Connect;
use virt::domain::{Domain as VirtDomain, DomainState};
use virt::error::{Error, ErrorNumber};
use virt_sys as vir;

use super::error::is_no_domain;
use super::sys::{self, Handler, RawEvent};
use super::{Shared, follow, lock};
use crate::clock::now;
use crate::hypervisor::{domain_xml, metadata};
use crate::proto::{Domain, DomainUuid, HypervisorEvent};

/// Pauses before reconnecting.
const BACK_OFF: Backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
/// Seconds of silence after which libvirt sends a keepalive message. The connection is closed after
/// [`KEEPALIVE_COUNT`] messages without an answer.
const KEEPALIVE_INTERVAL: i32 = 2;
/// Keepalive messages without an answer; see [`KEEPALIVE_INTERVAL`].
const KEEPALIVE_COUNT: u32 = 3;

/// Message to the thread.
#[derive(Debug)]
pub(super) enum Work {
    /// libvirt called a callback of this connection (numbered from 1).
    Event(u64, RawEvent),
    /// The thread must end.
    Stop,
}

/// Why a session ended.
enum End {
    Stop,
    Lost(String),
}

/// Connects and watches until [`Work::Stop`].
pub(super) fn run(
    shared: &Arc<Shared>,
    names: Option<Sender<DomainUuid>>,
    work: &Sender<Work>,
    inbox: &Receiver<Work>,
) {
    let mut watch = Watch {
        shared,
        names,
        known: HashMap::new(),
        arriving: HashSet::new(),
    };
    let mut backoff = BACK_OFF;
    let mut told = false;
    for session in 1.. {
        let end = watch.session(session, work, inbox);
        let was_up = lock(&shared.connection).take().is_some();
        let reason = match end {
            End::Stop => return,
            End::Lost(reason) => reason,
        };
        if was_up || !told {
            told = true;
            tracing::warn!(uri = shared.config.uri, %reason, "libvirt is not connected");
            shared.emit(HypervisorEvent::Disconnected { reason });
        }
        if was_up {
            backoff.reset();
        }
        if wait(inbox, backoff.delay()) {
            return;
        }
    }
}

/// Waits, and discards events of the lost connection. Returns true after [`Work::Stop`].
fn wait(inbox: &Receiver<Work>, pause: Duration) -> bool {
    let deadline = Instant::now() + pause;
    loop {
        match inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Work::Event(..)) => {}
            Ok(Work::Stop) | Err(RecvTimeoutError::Disconnected) => return true,
            Err(RecvTimeoutError::Timeout) => return false,
        }
    }
}

struct Watch<'a> {
    shared: &'a Arc<Shared>,
    /// Channel to the metadata thread, for domains without this agent's name.
    names: Option<Sender<DomainUuid>>,
    /// Domains, as last reported.
    known: HashMap<DomainUuid, Domain>,
    /// Domains reported as arriving.
    arriving: HashSet<DomainUuid>,
}

/// What to report about a domain.
enum Described {
    /// Active, with its NICs.
    Active(Domain),
    /// Arriving by a migration.
    Arriving { uuid: DomainUuid, name: String },
    /// Not active, or gone.
    Absent,
}

impl Watch<'_> {
    fn session(&mut self, session: u64, work: &Sender<Work>, inbox: &Receiver<Work>) -> End {
        let uri = &self.shared.config.uri;
        let unreachable = |error: Error| {
            End::Lost(format!(
                "libvirtd at {uri} cannot be reached: {}",
                error.message()
            ))
        };
        let lost =
            |error: Error| End::Lost(format!("libvirtd at {uri} went away: {}", error.message()));
        let connection = match Connect::open(Some(uri)) {
            Ok(connection) => connection,
            Err(error) => return unreachable(error),
        };
        // Drivers inside this process, such as `test`, have no keepalive.
        if let Err(error) = connection.set_keep_alive(KEEPALIVE_INTERVAL, KEEPALIVE_COUNT) {
            tracing::debug!(%error, "libvirt connection without keepalive");
        }
        lock(&self.shared.departing).clear();
        // Before the list, so that no change falls between list and events.
        let handler = || handler(Arc::clone(self.shared), session, work.clone());
        let _subscription = match sys::subscribe(&connection, handler) {
            Ok(subscription) => subscription,
            Err(error) => return unreachable(error),
        };
        if let Err(error) = self.list(&connection) {
            return lost(error);
        }
        *lock(&self.shared.connection) = Some(connection.clone());
        tracing::info!(uri, domains = self.known.len(), "libvirt is connected");
        self.shared.emit(HypervisorEvent::Connected);
        loop {
            let uuid = match inbox.recv() {
                Err(_) | Ok(Work::Stop) => return End::Stop,
                Ok(Work::Event(of, _)) if of != session => continue,
                Ok(Work::Event(_, RawEvent::Closed { reason })) => {
                    let how = match reason {
                        vir::VIR_CONNECT_CLOSE_REASON_EOF => "it stopped",
                        vir::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "it no longer answers",
                        _ => "the connection failed",
                    };
                    return End::Lost(format!("libvirtd at {uri} went away: {how}"));
                }
                Ok(Work::Event(
                    _,
                    RawEvent::Lifecycle { uuid, .. } | RawEvent::DevicesChanged { uuid },
                )) => uuid,
                Ok(Work::Event(..)) => continue,
            };
            if let Err(error) = self.refresh(&connection, uuid)
                && !connection.is_alive().unwrap_or(false)
            {
                return lost(error);
            }
        }
    }

    fn list(&mut self, connection: &Connect) -> Result<(), Error> {
        let mut present = HashSet::new();
        for domain in connection.list_all_domains(vir::VIR_CONNECT_LIST_DOMAINS_ACTIVE)? {
            let described = match self.describe(&domain)? {
                Described::Active(described) => described,
                Described::Arriving { uuid, name } => {
                    present.insert(uuid);
                    self.arrives(uuid, name);
                    continue;
                }
                Described::Absent => continue,
            };
            let uuid = described.uuid;
            let departs = sys::is_migrating(&domain).unwrap_or(false);
            if departs && is_paused(&domain) {
                lock(&self.shared.departing).insert(uuid);
            }
            present.insert(uuid);
            self.known.insert(uuid, described.clone());
            self.shared.emit(HypervisorEvent::Domain(described));
            if departs {
                follow::adopt(self.shared, domain, uuid);
            }
        }
        let gone: Vec<_> = self
            .known
            .keys()
            .chain(&self.arriving)
            .filter(|uuid| !present.contains(uuid))
            .copied()
            .collect();
        for uuid in gone {
            self.gone(uuid);
        }
        Ok(())
    }

    /// Reads a domain that an event named, and reports it.
    fn refresh(&mut self, connection: &Connect, uuid: DomainUuid) -> Result<(), Error> {
        let described = match connection.lookup_domain_by_uuid_string(&uuid.to_string()) {
            Ok(domain) => self.describe(&domain)?,
            Err(error) if is_no_domain(&error) => Described::Absent,
            Err(error) => return Err(error),
        };
        match described {
            Described::Active(domain) if self.known.get(&uuid) == Some(&domain) => {}
            Described::Active(domain) => {
                self.arriving.remove(&uuid);
                self.known.insert(uuid, domain.clone());
                self.shared.emit(HypervisorEvent::Domain(domain));
            }
            Described::Arriving { uuid, name } => self.arrives(uuid, name),
            Described::Absent => self.gone(uuid),
        }
        Ok(())
    }

    fn arrives(&mut self, uuid: DomainUuid, name: String) {
        if self.arriving.insert(uuid) {
            self.shared.emit(HypervisorEvent::Arriving { uuid, name });
        }
    }

    fn gone(&mut self, uuid: DomainUuid) {
        lock(&self.shared.departing).remove(&uuid);
        let (active, arriving) = (self.known.remove(&uuid), self.arriving.remove(&uuid));
        if active.is_some() || arriving {
            self.shared.emit(HypervisorEvent::Gone(uuid));
        }
    }

    /// Reads a domain; a domain that no longer exists is no error.
    fn describe(&self, domain: &VirtDomain) -> Result<Described, Error> {
        match self.read(domain) {
            Err(error) if is_no_domain(&error) => Ok(Described::Absent),
            result => result,
        }
    }

    fn read(&self, domain: &VirtDomain) -> Result<Described, Error> {
        if !domain.is_active()? {
            return Ok(Described::Absent);
        }
        let uuid = DomainUuid(*domain.uuid()?.as_bytes());
        let name = domain.name()?;
        let (state, _) = domain.state()?;
        let running = state == DomainState::Running.into() || state == DomainState::Blocked.into();
        // libvirt returns the XML of an arriving domain only after the arrival, and the call would
        // block this thread until then.
        if state == DomainState::Paused.into() && is_arriving(domain) {
            return Ok(Described::Arriving { uuid, name });
        }
        let xml = domain.xml_desc(0)?;
        if running {
            self.name(uuid, &xml);
        }
        let interfaces = domain_xml::interfaces(&xml, &self.shared.config.bridge, has_vhost_net())
            .inspect_err(|error| tracing::warn!(domain = name, %error, "Domain has no usable NICs"))
            .unwrap_or_default();
        Ok(Described::Active(Domain {
            uuid,
            name,
            running,
            interfaces,
        }))
    }
}

impl Watch<'_> {
    /// Passes a domain to the metadata thread if its metadata lacks this agent's name.
    fn name(&self, uuid: DomainUuid, xml: &str) {
        let (Some(names), Some(agent)) = (&self.names, &self.shared.config.metadata) else {
            return;
        };
        let known = metadata::agent(xml);
        if known.is_ok_and(|known| known.as_ref() != Some(agent)) {
            // The metadata thread ends only with this thread.
            let _ = names.send(uuid);
        }
    }
}

/// Returns true if libvirt uses vhost-net for a NIC by default.
fn has_vhost_net() -> bool {
    Path::new("/dev/vhost-net").exists()
}

/// Returns true if a paused domain is arriving by a migration. Only the source knows the statistics
/// of a migration; libvirt refuses them to the destination.
fn is_arriving(domain: &VirtDomain) -> bool {
    sys::job_stats(domain)
        .is_err_and(|error| error.code() == ErrorNumber::OperationUnsupported.into())
}

fn is_paused(domain: &VirtDomain) -> bool {
    domain
        .state()
        .is_ok_and(|(state, _)| state == DomainState::Paused.into())
}

/// Returns the handler for the event loop's thread, which only sends messages.
fn handler(shared: Arc<Shared>, session: u64, work: Sender<Work>) -> Handler {
    Box::new(move |event| {
        tracing::debug!(?event, "libvirt event");
        match &event {
            RawEvent::Lifecycle {
                uuid,
                event,
                detail,
            } => lifecycle(&shared, *uuid, *event, *detail),
            RawEvent::JobCompleted { uuid, stats } => {
                if let Some(migration) = lock(&shared.migrations).get(uuid) {
                    migration.completed(*stats);
                }
            }
            _ => {}
        }
        let _ = work.send(Work::Event(session, event));
    })
}

fn lifecycle(shared: &Shared, uuid: DomainUuid, event: u32, detail: u32) {
    let at = now();
    match (event, detail) {
        (
            vir::VIR_DOMAIN_EVENT_SUSPENDED,
            vir::VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED | vir::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY,
        ) => {
            lock(&shared.departing).insert(uuid);
            if let Some(migration) = lock(&shared.migrations).get(&uuid) {
                migration.switched();
            }
            shared.emit(HypervisorEvent::Suspended { uuid, at });
        }
        (vir::VIR_DOMAIN_EVENT_RESUMED, detail) => {
            // The resume of a source after a failed migration has the same detail as the resume at
            // a destination.
            let departed = lock(&shared.departing).remove(&uuid);
            let migrated = !departed
                && matches!(
                    detail,
                    vir::VIR_DOMAIN_EVENT_RESUMED_MIGRATED | vir::VIR_DOMAIN_EVENT_RESUMED_POSTCOPY
                );
            shared.emit(HypervisorEvent::Resumed { uuid, migrated, at });
        }
        (vir::VIR_DOMAIN_EVENT_STOPPED, _) => {
            lock(&shared.departing).remove(&uuid);
        }
        _ => {}
    }
}
