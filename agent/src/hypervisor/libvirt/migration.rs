//! Outgoing migrations that this agent starts: the blocking call, its progress, its end.
//! [`super::follow`] follows other migrations.

use std::ffi::{CStr, CString};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::ErrorNumber;
use virt_sys as vir;

use super::sys::{self, Value};
use super::{Shared, lock, settle};
use crate::hypervisor::MigrateRequest;
use crate::proto::{DomainUuid, HypervisorEvent, JobStats};

/// Interval at which the progress thread polls the statistics.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Longest wait for the statistics of a completed migration, which arrive as an event.
pub(super) const COMPLETED_WAIT: Duration = Duration::from_millis(500);

/// A running migration, shared by its threads.
#[derive(Debug, Default)]
pub(super) struct Migration {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct State {
    /// True: the migration has to be cancelled.
    abort: bool,
    /// Deadline for the start of an announced migration; `None` once the migration is running.
    pub(super) awaited: Option<Instant>,
    /// True after the blocking call has returned.
    returned: bool,
    /// True after the switch has begun.
    pub(super) switched: bool,
    /// Statistics of the completed job.
    pub(super) completed: Option<JobStats>,
}

impl Migration {
    /// Stores the statistics of the completed job.
    pub(super) fn completed(&self, stats: JobStats) {
        self.update(|state| state.completed = Some(stats));
    }

    /// Records that the domain's CPUs have stopped for the switch.
    pub(super) fn switched(&self) {
        self.update(|state| state.switched = true);
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        self.changed.notify_all();
    }

    /// Returns the current result of `read`.
    pub(super) fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&lock(&self.state))
    }

    /// Waits until `until` holds, at most for `time`, and returns the result of `read`.
    pub(super) fn wait<T>(
        &self,
        time: Duration,
        until: impl Fn(&State) -> bool,
        read: impl FnOnce(&State) -> T,
    ) -> T {
        let guard = lock(&self.state);
        let (guard, _) = self
            .changed
            .wait_timeout_while(guard, time, |state| !until(state))
            .unwrap_or_else(PoisonError::into_inner);
        read(&guard)
    }
}

/// Starts a migration on threads of its own.
pub(super) fn start(shared: &Arc<Shared>, request: MigrateRequest) {
    let uuid = request.uuid;
    let Some(connection) = shared.connection() else {
        let uri = &shared.config.uri;
        let result = Err(format!(
            "libvirtd at {uri} is not connected; start it and try again"
        ));
        return shared.emit(HypervisorEvent::MigrationEnded { uuid, result });
    };
    let migration = Arc::new(Migration::default());
    {
        let mut migrations = lock(&shared.migrations);
        // An announced migration that has not started yields silently.
        let awaited = |known: &Arc<Migration>| known.read(|state| state.awaited.is_some());
        if migrations.get(&uuid).is_some_and(|known| !awaited(known)) {
            // The end of the running migration answers this request too.
            tracing::warn!(%uuid, "Domain is being migrated already");
            return;
        }
        migrations.insert(uuid, Arc::clone(&migration));
    }
    let spawned = thread::Builder::new()
        .name("libvirt-migrate".to_owned())
        .spawn({
            let shared = Arc::clone(shared);
            move || {
                let result = run(&shared, &connection, &migration, &request);
                let has_failed = result.is_err();
                end(&shared, uuid, result);
                if has_failed && migration.read(|state| state.switched) {
                    settle::clear_destination(&shared, uuid, &request.connect_uri);
                }
            }
        });
    if let Err(error) = spawned {
        end(shared, uuid, Err(format!("Cannot start a thread: {error}")));
    }
}

pub(super) fn abort_if_asked(migration: &Migration, domain: &Domain, uuid: DomainUuid) {
    if migration.read(|state| state.abort) {
        // Before the job exists, and after the switch has begun, libvirt refuses to cancel.
        if let Err(error) = sys::abort_job(domain) {
            tracing::debug!(%uuid, %error, "Migration is not cancelled yet");
        }
    }
}

/// Cancels a migration, whoever started it.
pub(super) fn abort(shared: &Arc<Shared>, uuid: DomainUuid) {
    if let Some(migration) = lock(&shared.migrations).get(&uuid) {
        return migration.update(|state| state.abort = true);
    }
    // An earlier agent may have started the migration.
    let Some(connection) = shared.connection() else {
        return;
    };
    let spawned = thread::Builder::new()
        .name("libvirt-abort".to_owned())
        .spawn(move || {
            let result = connection
                .lookup_domain_by_uuid_string(&uuid.to_string())
                .and_then(|domain| sys::abort_job(&domain));
            if let Err(error) = result {
                tracing::debug!(%uuid, %error, "No migration to cancel");
            }
        });
    if let Err(error) = spawned {
        tracing::warn!(%uuid, %error, "Cannot start a thread to cancel a migration");
    }
}

pub(super) fn end(shared: &Shared, uuid: DomainUuid, result: Result<JobStats, String>) {
    lock(&shared.migrations).remove(&uuid);
    match &result {
        Ok(stats) => tracing::info!(%uuid, ?stats, "Migration is over"),
        Err(reason) => tracing::warn!(%uuid, reason, "Migration failed"),
    }
    shared.emit(HypervisorEvent::MigrationEnded { uuid, result });
}

fn run(
    shared: &Shared,
    connection: &Connect,
    migration: &Migration,
    request: &MigrateRequest,
) -> Result<JobStats, String> {
    let domain = connection
        .lookup_domain_by_uuid_string(&request.uuid.to_string())
        .map_err(|error| {
            format!(
                "libvirt cannot migrate domain {}: {}",
                request.uuid,
                error.message()
            )
        })?;
    let name = domain.name().unwrap_or_else(|_| request.uuid.to_string());
    let uri = &request.connect_uri;
    let dconn_uri = c_string("connect URI", uri)?;
    let parameters = parameters(shared, request)?;
    let flags = shared.config.flags.encrypted(request.tls).bits();

    // Set the limit now; libvirt versions that reset it at the start of the job get it again later.
    if let Some(limit) = shared.config.downtime_limit {
        set_downtime_limit(&domain, limit.least());
    }
    let outcome: Result<_, String> = thread::scope(|scope| {
        let progress = thread::Builder::new()
            .name("libvirt-progress".to_owned())
            .spawn_scoped(scope, || progress(shared, migration, &domain, request.uuid))
            .map_err(|error| format!("Cannot start a thread: {error}"))?;
        let result = sys::migrate_to_uri3(&domain, &dconn_uri, &parameters, flags);
        migration.update(|state| state.returned = true);
        Ok((result, progress.join().unwrap_or_default()))
    });
    let (result, last): (_, JobStats) = outcome?;
    match result {
        Ok(()) => {
            let completed = migration.wait(
                COMPLETED_WAIT,
                |state| state.completed.is_some(),
                |state| state.completed,
            );
            Ok(completed.unwrap_or(last))
        }
        Err(_) if !connection.is_alive().unwrap_or(false) => {
            settle::settle(shared, request.uuid, Some(uri)).map(|()| last)
        }
        Err(error) if error.code() == ErrorNumber::OperationAborted.into() => Err(format!(
            "The migration of domain `{name}` to {uri} was cancelled"
        )),
        Err(error) => Err(format!(
            "libvirt cannot migrate domain `{name}` to {uri}: {}",
            error.message()
        )),
    }
}

fn parameters(
    shared: &Shared,
    request: &MigrateRequest,
) -> Result<Vec<(&'static CStr, Value)>, String> {
    let config = &shared.config;
    let mut parameters = Vec::new();
    if !request.migrate_uri.is_empty() {
        let uri = c_string("migration URI", &request.migrate_uri)?;
        parameters.push((vir::VIR_MIGRATE_PARAM_URI, Value::Text(uri)));
    }
    if let Some(bandwidth) = config.bandwidth {
        parameters.push((vir::VIR_MIGRATE_PARAM_BANDWIDTH, Value::Long(bandwidth)));
    }
    if let Some(connections) = config.parallel_connections {
        parameters.push((
            vir::VIR_MIGRATE_PARAM_PARALLEL_CONNECTIONS,
            Value::Int(connections.into()),
        ));
    }
    Ok(parameters)
}

fn c_string(what: &str, text: &str) -> Result<CString, String> {
    CString::new(text)
        .map_err(|_| format!("The {what} `{}` holds a zero byte", text.escape_debug()))
}

/// Polls statistics until the call has returned, sets the downtime limit once the job runs, and
/// cancels the job on request. Returns the last statistics.
fn progress(shared: &Shared, migration: &Migration, domain: &Domain, uuid: DomainUuid) -> JobStats {
    let mut last = JobStats::default();
    let mut downtime_limit = shared.config.downtime_limit;
    let mut next = Instant::now();
    loop {
        next += POLL_INTERVAL;
        let pause = next.saturating_duration_since(Instant::now());
        let returned = migration.wait(pause, |state| state.returned, |state| state.returned);
        if returned {
            return last;
        }
        next = next.max(Instant::now());
        abort_if_asked(migration, domain, uuid);
        match sys::job_stats(domain) {
            Ok(Some(stats)) if stats.total_bytes > 0 => {
                let limit = downtime_limit.as_mut();
                if let Some(limit) = limit.and_then(|it| it.next(stats.iteration)) {
                    set_downtime_limit(domain, limit);
                }
                if stats != last {
                    last = stats;
                    shared.emit(HypervisorEvent::Progress { uuid, stats });
                }
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%uuid, %error, "No statistics of the migration"),
        }
    }
}

fn set_downtime_limit(domain: &Domain, limit: Duration) {
    let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1);
    if let Err(error) = domain.migrate_set_max_downtime(milliseconds, 0) {
        tracing::warn!(%error, milliseconds, "libvirt does not take the downtime limit");
    }
}
