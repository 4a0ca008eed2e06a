//! Follows migrations that an earlier agent or another libvirt client has started.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use virt::domain::Domain;
use virt::error::Error;

use super::error::is_no_domain;
use super::migration::{self, COMPLETED_WAIT, Migration, POLL_INTERVAL};
use super::{Shared, lock, settle, sys};
use crate::proto::{DomainUuid, HypervisorEvent, JobStats};

/// Longest time between the announcement and the start of a migration: QEMU starts at the
/// destination first.
pub(super) const BEGIN: Duration = Duration::from_secs(30);

/// Follows a running migration.
pub(super) fn adopt(shared: &Arc<Shared>, domain: Domain, uuid: DomainUuid) {
    let migration = Arc::new(Migration::default());
    {
        let mut migrations = lock(&shared.migrations);
        if migrations.contains_key(&uuid) {
            return;
        }
        migrations.insert(uuid, Arc::clone(&migration));
    }
    shared.emit(HypervisorEvent::Departing { uuid });
    spawn(shared, uuid, move |shared| {
        let result = follow(shared, &migration, &domain, uuid);
        migration::end(shared, uuid, result);
    });
}

/// Follows a migration that is about to start, if it starts within `begin`.
pub(super) fn expect(shared: &Arc<Shared>, uuid: DomainUuid, begin: Duration) {
    let migration = Arc::new(Migration::default());
    let until = Instant::now() + begin;
    migration.update(|state| state.awaited = Some(until));
    {
        let mut migrations = lock(&shared.migrations);
        if let Some(known) = migrations.get(&uuid) {
            // A repeated announcement. A migration that has started is followed already.
            known.update(|state| state.awaited = state.awaited.map(|_| until));
            return;
        }
        migrations.insert(uuid, Arc::clone(&migration));
    }
    spawn(shared, uuid, move |shared| {
        let result = expected(shared, &migration, uuid);
        if is_current(shared, &migration, uuid) {
            migration::end(shared, uuid, result);
        }
    });
}

/// Returns true if no newer migration of the domain has replaced this one.
fn is_current(shared: &Shared, migration: &Arc<Migration>, uuid: DomainUuid) -> bool {
    let migrations = lock(&shared.migrations);
    let known = migrations.get(&uuid);
    known.is_some_and(|known| Arc::ptr_eq(known, migration))
}

fn spawn(shared: &Arc<Shared>, uuid: DomainUuid, run: impl FnOnce(&Shared) + Send + 'static) {
    let spawned = thread::Builder::new()
        .name("libvirt-progress".to_owned())
        .spawn({
            let shared = Arc::clone(shared);
            move || run(&shared)
        });
    if let Err(error) = spawned {
        let result = Err(format!("Cannot start a thread: {error}"));
        migration::end(shared, uuid, result);
    }
}

/// Waits for the start of a migration and follows it to its end.
fn expected(
    shared: &Shared,
    migration: &Arc<Migration>,
    uuid: DomainUuid,
) -> Result<JobStats, String> {
    loop {
        let is_over = |until: Instant| Instant::now() >= until;
        if migration.read(|state| state.awaited.is_some_and(is_over)) {
            return Err("nobody has asked libvirt to move it within the time for that".to_owned());
        }
        if !is_current(shared, migration, uuid) {
            return Err("it is moved by this agent instead".to_owned());
        }
        match look(shared, uuid) {
            Ok(Place::Leaves(domain)) => {
                migration.update(|state| state.awaited = None);
                shared.emit(HypervisorEvent::Departing { uuid });
                return follow(shared, migration, &domain, uuid);
            }
            Ok(Place::Stays) => {}
            Ok(Place::Gone) => {
                // The migration was faster than the polling, or the domain was shut down.
                let completed = migration.wait(
                    COMPLETED_WAIT,
                    |state| state.completed.is_some(),
                    |state| state.completed,
                );
                let has_left = completed.is_some() || migration.read(|state| state.switched);
                return has_left
                    .then(|| completed.unwrap_or_default())
                    .ok_or_else(|| "it was shut down before libvirt has moved it".to_owned());
            }
            Err(error) => tracing::debug!(%uuid, %error, "Domain cannot be looked at"),
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Where a domain is that should leave.
enum Place {
    /// On this host, as far as known.
    Stays,
    /// Leaving: libvirt is migrating the domain.
    Leaves(Domain),
    Gone,
}

fn look(shared: &Shared, uuid: DomainUuid) -> Result<Place, Error> {
    let Some(connection) = shared.connection() else {
        return Ok(Place::Stays);
    };
    let domain = match connection.lookup_domain_by_uuid_string(&uuid.to_string()) {
        Err(error) if is_no_domain(&error) => return Ok(Place::Gone),
        domain => domain?,
    };
    Ok(if !domain.is_active()? {
        Place::Gone
    } else if sys::is_migrating(&domain)? {
        Place::Leaves(domain)
    } else {
        Place::Stays
    })
}

fn follow(
    shared: &Shared,
    migration: &Migration,
    domain: &Domain,
    uuid: DomainUuid,
) -> Result<JobStats, String> {
    let mut last = JobStats::default();
    loop {
        thread::sleep(POLL_INTERVAL);
        migration::abort_if_asked(migration, domain, uuid);
        match sys::job_stats(domain) {
            Ok(Some(stats)) => {
                if stats != last {
                    last = stats;
                    shared.emit(HypervisorEvent::Progress { uuid, stats });
                }
            }
            // A successful migration stops the domain at the source before its job ends, so this
            // one has failed.
            Ok(None) if domain.is_active().unwrap_or(false) => {
                return Err("libvirt has given it up; its log says why".to_owned());
            }
            // The domain or libvirtd no longer answers. The location of the domain decides.
            Ok(None) | Err(_) => {
                let completed = migration.wait(
                    COMPLETED_WAIT,
                    |state| state.completed.is_some(),
                    |state| state.completed,
                );
                return settle::settle(shared, uuid, None).map(|()| completed.unwrap_or(last));
            }
        }
    }
}
