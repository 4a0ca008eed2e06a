//! Certificates that are replaced while connections are up.
//!
//! Files are looked at again and again, and loaded once they are others and have stayed so for a look: they are
//! copied one after the other, and a new certificate does not fit the old key. Connections that are up stay; each
//! new one takes the new files. What cannot be used is told of once, and the old certificate goes on.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use time::OffsetDateTime;
use tokio::time::sleep;

use super::Shared;
use crate::net::tls::{Stamps, Tls, TlsError};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(3);

/// So long before its end a certificate is warned of.
pub(super) const WARN_DAYS: i64 = 30;
/// How often.
const WARN_INTERVAL: Duration = Duration::from_secs(24 * 3600);

/// What was seen at the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// The files that are in use.
    Same,
    /// Others, for the first time.
    Others(Stamps),
    /// Others that cannot be used.
    Unusable(Stamps),
}

/// Looks until told to stop.
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
        // Never cancelled, and it does not panic.
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

/// Looks once.
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

        // Another key: it does not fit, for now or for good.
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
