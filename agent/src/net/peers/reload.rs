//! Replaces the certificates while connections are up.
//!
//! The task checks the files periodically. It loads changed files only after they have stayed the
//! same for one interval: an operator copies the files one by one, and a new certificate does not
//! match the old key. Existing connections stay; new ones use the new files. Unusable files are
//! reported once, and the old certificate stays in use.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::time::sleep;

use super::Shared;
use crate::net::tls::{Stamps, Tls, TlsError};

/// Interval between two checks.
const LOOK: Duration = Duration::from_secs(3);

/// Days before the expiry of the certificate at which the warnings start.
pub(super) const WARN_DAYS: i64 = 30;
/// Interval between the warnings.
const WARN_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// State of the files at the last check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// The files in use.
    Same,
    /// Changed files, seen for the first time.
    Others(Stamps),
    /// Changed files that failed to load.
    Unusable(Stamps),
}

/// Checks the files until shutdown.
pub(super) async fn run(shared: Arc<Shared>) {
    let mut seen = Seen::Same;
    let mut warned: Option<Instant> = None;
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = sleep(LOOK) => {}
        }
        let tls = shared.tls();
        if warned.is_none_or(|at| at.elapsed() >= WARN_INTERVAL)
            && let Some(days) = tls.days_left(OffsetDateTime::now_utc())
            && days < WARN_DAYS
        {
            warned = Some(Instant::now());
            tracing::warn!(
                days,
                "The certificate of this host ends soon; make another one with `roamcast pki renew`"
            );
        }
        let last = seen;
        // The task is never cancelled, and `look` does not panic.
        let looked = tokio::task::spawn_blocking(move || look(&tls, last)).await;
        let Ok((now, loaded)) = looked else { return };
        seen = now;
        match loaded {
            None => {}
            Some(Ok(tls)) => {
                *shared.tls.write().unwrap_or_else(PoisonError::into_inner) = tls;
                shared.counters.reloaded.fetch_add(1, Ordering::Relaxed);
                tracing::info!("Certificates were replaced, and are used from now on");
            }
            Some(Err(error)) => {
                shared.counters.unusable.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(%error, "Certificates were replaced by some that cannot be used; the old ones go on");
            }
        }
    }
}

/// Checks the files once, and loads them if they have settled.
fn look(tls: &Tls, last: Seen) -> (Seen, Option<Result<Tls, TlsError>>) {
    let Some(stamps) = tls.changed() else {
        return (Seen::Same, None);
    };
    if last == Seen::Unusable(stamps) {
        return (last, None);
    }
    if last != Seen::Others(stamps) {
        return (Seen::Others(stamps), None);
    }
    match tls.reload() {
        Ok(tls) => (Seen::Same, Some(Ok(tls))),
        Err(error) => (Seen::Unusable(stamps), Some(Err(error))),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::net::tls::TlsFiles;
    use crate::pki::{self, IssueRequest, Validity};
    use crate::role::Role;

    #[test]
    fn files_are_loaded_once_they_have_stayed_and_those_that_are_unusable_once() {
        let directory = tempfile::tempdir().unwrap();
        let pki = directory.path();
        pki::init(pki, "CA", Validity::days(1)).unwrap();
        let issue = |name: &str| {
            let request = IssueRequest {
                name: name.to_owned(),
                role: Role::Agent,
                addresses: Vec::new(),
                validity: Validity::days(1),
            };
            let issued = pki::issue(pki, &request).unwrap();
            TlsFiles::from(&issued.signalling)
        };
        let files = issue("vms1");
        let tls = Tls::load(&files, "vms1", Role::Agent).unwrap();
        assert!(matches!(look(&tls, Seen::Same), (Seen::Same, None)));

        // Another key that does not match the certificate.
        let other = issue("vms2");
        let key = fs::read(&files.key).unwrap();
        fs::copy(&other.key, &files.key).unwrap();
        let (seen, loaded) = look(&tls, Seen::Same);
        assert!(matches!(seen, Seen::Others(_)) && loaded.is_none());
        let (seen, loaded) = look(&tls, seen);
        assert!(matches!(loaded, Some(Err(TlsError::WrongKey { .. }))));
        let (seen, loaded) = look(&tls, seen);
        assert!(matches!(seen, Seen::Unusable(_)) && loaded.is_none());

        fs::remove_file(&files.key).unwrap();
        let (seen, _) = look(&tls, seen);
        fs::write(&files.key, key).unwrap();
        let (seen, loaded) = look(&tls, seen);
        assert!(matches!(seen, Seen::Others(_)) && loaded.is_none());
        let (seen, loaded) = look(&tls, seen);
        assert_eq!(seen, Seen::Same);
        let tls = loaded.unwrap().unwrap();
        assert!(matches!(look(&tls, seen), (Seen::Same, None)));
    }
}
