//! Decides where a domain runs whose migration lost a libvirtd.
//!
//! A libvirtd that restarts examines its domains. It resumes a domain whose memory was still being
//! copied, and ends a domain that has moved. In one case it leaves the domain paused: when all
//! memory was sent but the destination's confirmation had not arrived. Then the agent decides:
//!
//! | at the source | at the destination | action |
//! |---|---|---|
//! | runs | | none: the migration has failed |
//! | gone | | none: the migration has succeeded |
//! | paused | runs | end the domain at the source |
//! | paused | gone | resume the domain at the source |
//! | paused | paused, or not known | check again, then leave the decision to the operator |

use std::thread;
use std::time::{Duration, Instant};

use virt::connect::Connect;
use virt::domain::{Domain, DomainPausedReason, DomainState, DomainStateReason};
use virt::error::Error;
use virt_sys as vir;

use super::error::is_no_domain;
use super::{Shared, lock};
use crate::clock::now;
use crate::proto::{DomainUuid, HypervisorEvent};

/// Longest wait for libvirtd to restart and for both hosts to agree.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time for which a domain must stay paused before the agent acts: libvirtd may be about to resume
/// it.
const PAUSED: Duration = Duration::from_secs(2);
/// Interval between two checks.
const INTERVAL: Duration = Duration::from_millis(200);

/// State of a domain on one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Runs,
    Paused,
    Gone,
}

/// Finds out how a migration ended, and completes it if libvirt does not. Blocks.
///
/// `destination` is the libvirt URI of the other host, if known.
///
/// # Errors
///
/// One sentence for a person that says where the domain is, unless the domain has moved.
pub(super) fn settle(
    shared: &Shared,
    uuid: DomainUuid,
    destination: Option<&str>,
) -> Result<(), String> {
    let uri = &shared.config.uri;
    let deadline = Instant::now() + PATIENCE;
    let mut paused_since = None;
    while Instant::now() < deadline {
        thread::sleep(INTERVAL);
        let Some(connection) = shared.connection() else {
            continue;
        };
        let Ok((place, domain)) = look(&connection, uuid) else {
            continue;
        };
        match (place, domain) {
            (Place::Gone, _) => return Ok(()),
            (Place::Runs, _) => {
                // The list may have shown the domain as paused; libvirtd then resumed it without an
                // event.
                shared.emit(HypervisorEvent::Resumed {
                    uuid,
                    migrated: false,
                    at: now(),
                });
                return Err(format!(
                    "libvirtd at {uri} stopped before the switch was complete"
                ));
            }
            (Place::Paused, domain) => {
                let since = *paused_since.get_or_insert_with(Instant::now);
                if since.elapsed() < PAUSED {
                    continue;
                }
                let (Some(uri), Some(domain)) = (destination, domain) else {
                    break;
                };
                if let Err(error) = decide(shared, &domain, uuid, uri) {
                    tracing::warn!(%uuid, %error, "Domain stays paused for now");
                }
            }
        }
    }
    Err(if paused_since.is_some() {
        format!(
            "libvirtd at {uri} stopped during the switch, and whether the domain runs at the \
             destination is not known; if it does not, run `virsh resume {uuid}`"
        )
    } else {
        format!(
            "libvirtd at {uri} stopped while the domain was being migrated; start it and see where \
             the domain runs"
        )
    })
}

/// Removes the remains of a domain at the destination after a migration that failed during the
/// switch. A source that loses the destination's libvirtd resumes its domain. That libvirtd leaves
/// the domain running after its restart if it had started the CPUs. Blocks.
pub(super) fn clear_destination(shared: &Shared, uuid: DomainUuid, destination: &str) {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let runs_here = shared
            .connection()
            .and_then(|here| look(&here, uuid).ok())
            .is_some_and(|(place, _)| place == Place::Runs);
        if !runs_here || lock(&shared.migrations).contains_key(&uuid) {
            return;
        }
        match Connect::open(Some(destination)).and_then(|there| look(&there, uuid)) {
            Ok((Place::Gone, _)) => return,
            Ok((_, Some(domain))) => {
                tracing::warn!(%uuid, "Domain runs here; what is left at the destination is ended");
                if let Err(error) = discard(&domain, true) {
                    tracing::warn!(%uuid, %error, "Domain is not ended at the destination yet");
                }
            }
            Ok((_, None)) | Err(_) => {}
        }
        thread::sleep(INTERVAL);
    }
    tracing::error!(
        %uuid,
        destination,
        "It is not known whether the domain is also left at the destination; if so, end it there"
    );
}

/// Ends or resumes a domain that is paused here, depending on its state at the destination.
fn decide(
    shared: &Shared,
    domain: &Domain,
    uuid: DomainUuid,
    destination: &str,
) -> Result<(), Error> {
    let there = Connect::open(Some(destination))?;
    match look(&there, uuid)?.0 {
        Place::Runs => {
            tracing::warn!(%uuid, "Domain runs at the destination; it is ended here");
            let undefine = shared.config.flags.bits() & vir::VIR_MIGRATE_UNDEFINE_SOURCE != 0;
            discard(domain, undefine)
        }
        Place::Gone => {
            tracing::warn!(%uuid, "Domain does not run at the destination; it is resumed here");
            domain.resume().map(drop)
        }
        Place::Paused => Ok(()),
    }
}

fn look(connection: &Connect, uuid: DomainUuid) -> Result<(Place, Option<Domain>), Error> {
    match connection.lookup_domain_by_uuid_string(&uuid.to_string()) {
        Ok(domain) => Ok((place(&domain)?, Some(domain))),
        Err(error) if is_no_domain(&error) => Ok((Place::Gone, None)),
        Err(error) => Err(error),
    }
}

fn place(domain: &Domain) -> Result<Place, Error> {
    let (state, reason) = match domain.state() {
        Ok(state) => state,
        Err(error) if is_no_domain(&error) => return Ok(Place::Gone),
        Err(error) => return Err(error),
    };
    let for_migration = DomainStateReason::Paused(DomainPausedReason::Migration.into()).into();
    Ok(if !domain.is_active()? {
        Place::Gone
    } else if state == DomainState::Paused.into() && reason == for_migration {
        Place::Paused
    } else {
        Place::Runs
    })
}

/// Ends the domain as libvirt does after a migration.
fn discard(domain: &Domain, undefine: bool) -> Result<(), Error> {
    let is_persistent = domain.is_persistent()?;
    domain.destroy()?;
    if undefine && is_persistent {
        domain.undefine()?;
    }
    Ok(())
}
