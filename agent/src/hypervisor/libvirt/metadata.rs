//! The thread that leaves this agent's name with the domains of its host ([`super::super::metadata`]).
//!
//! It is a thread of its own because libvirt may keep it waiting for a domain's job, half a minute at
//! worst. Nothing depends on it but moves that somebody else asks for, so it goes on trying quietly.

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
use crate::config::Name;
use crate::hypervisor::metadata::{self, KEY, URI};
use crate::proto::DomainUuid;

/// How long a domain is left alone that was just seen: one that arrives has a job of libvirt's still.
const SETTLE: Duration = Duration::from_millis(500);
/// Pauses after failures.
const BACK_OFF: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

/// A domain whose metadata is to be written.
struct Task {
    due: Instant,
    backoff: Backoff,
}

/// What came of an attempt.
enum Attempt {
    /// There is nothing left to do.
    Done,
    /// The domain is being moved.
    Busy,
}

/// Starts the thread; it ends when the sender is dropped.
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

/// Makes an attempt; sets the next one if it was not the last.
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
        // It has perhaps no jobs to ask for.
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
