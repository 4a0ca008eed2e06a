//! The thread that writes this agent's name to the metadata of this host's domains
//! ([`super::super::metadata`]).
//!
//! The thread exists because libvirt may block it until a domain's job ends, up to half a minute.
//! Only migrations of other libvirt clients depend on the metadata, so the thread retries without an
//! error in the log.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use common::backoff::Backoff;
use virt::error::{Error, ErrorNumber};
use virt_sys as vir;

use super::error::is_no_domain;
use super::{Shared, lock, sys};
use crate::hypervisor::metadata::{self, KEY, URI};
use crate::proto::DomainUuid;
use crate::value::Name;

/// Delay after a domain was seen: libvirt still has a job on an arriving domain.
const SETTLE: Duration = Duration::from_millis(500);
/// Pauses after failures.
const BACK_OFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

/// A domain whose metadata has to be written, and the next attempt.
struct Task {
    due: Instant,
    backoff: Backoff,
}

/// Result of an attempt.
enum Attempt {
    /// The metadata is written, or the domain no longer exists.
    Done,
    /// libvirt is migrating the domain.
    Busy,
}

/// Starts the thread. The thread ends when the sender is dropped.
pub(super) fn start(shared: &Arc<Shared>, agent: Name) -> io::Result<Sender<DomainUuid>> {
    let (sender, inbox) = mpsc::channel();
    let shared = Arc::clone(shared);
    thread::Builder::new()
        .name("libvirt-metadata".to_owned())
        .spawn(move || run(&shared, &agent, &inbox))?;
    Ok(sender)
}

fn run(shared: &Shared, agent: &Name, inbox: &Receiver<DomainUuid>) {
    let mut tasks: HashMap<DomainUuid, Task> = HashMap::new();
    loop {
        let next = tasks.values().map(|task| task.due).min();
        let received = match next {
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(due) => inbox.recv_timeout(due.saturating_duration_since(Instant::now())),
        };
        match received {
            Ok(uuid) => {
                tasks.entry(uuid).or_insert_with(|| Task {
                    due: Instant::now() + SETTLE,
                    backoff: BACK_OFF,
                });
            }
            Err(RecvTimeoutError::Timeout) => tasks.retain(|uuid, task| {
                task.due > Instant::now() || !is_done(shared, agent, *uuid, task)
            }),
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Makes an attempt. Schedules the next one unless this was the last.
fn is_done(shared: &Shared, agent: &Name, uuid: DomainUuid, task: &mut Task) -> bool {
    match write(shared, agent, uuid) {
        Ok(Attempt::Done) => return true,
        Ok(Attempt::Busy) => {}
        Err(error) if error.code() == ErrorNumber::NoSupport.into() => {
            tracing::warn!(%uuid, %error, "libvirt keeps no metadata; moves by others are not handed over");
            return true;
        }
        Err(error) => {
            if task.backoff.is_first() {
                tracing::warn!(%uuid, %error, "This agent's name cannot be left with a domain yet");
            } else {
                tracing::debug!(%uuid, %error, "This agent's name cannot be left with a domain yet");
            }
        }
    }
    task.due = Instant::now() + task.backoff.delay();
    false
}

fn write(shared: &Shared, agent: &Name, uuid: DomainUuid) -> Result<Attempt, Error> {
    let Some(connection) = shared.connection() else {
        return Ok(Attempt::Busy);
    };
    let domain = match connection.lookup_domain_by_uuid_string(&uuid.to_string()) {
        Err(error) if is_no_domain(&error) => return Ok(Attempt::Done),
        domain => domain?,
    };
    if !domain.is_active()? {
        return Ok(Attempt::Done);
    }
    let is_moved = lock(&shared.migrations).contains_key(&uuid)
        // The driver may not support job queries.
        || sys::is_migrating(&domain).unwrap_or(false);
    if is_moved {
        return Ok(Attempt::Busy);
    }
    let known = metadata::agent(&domain.xml_desc(0)?);
    if known.is_ok_and(|known| known.as_ref() == Some(agent)) {
        return Ok(Attempt::Done);
    }
    domain.set_metadata(
        vir::VIR_DOMAIN_METADATA_ELEMENT.cast_signed(),
        Some(&metadata::element(agent)),
        Some(KEY),
        Some(URI),
        vir::VIR_DOMAIN_AFFECT_LIVE,
    )?;
    tracing::debug!(%uuid, "This agent's name is left with the domain");
    Ok(Attempt::Done)
}
