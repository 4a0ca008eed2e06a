//! Blocking work on a thread of its own: one piece at a time, which is kept until it ends.
//!
//! `select!` drops a waiting future whenever another one is ready. Blocking work that starts in
//! such a future would continue unobserved after the drop, and the next round would start the same
//! work again, as often as somebody can cause an event.

use std::future;

use tokio::task::{JoinError, JoinHandle, spawn_blocking};

/// Holder of at most one piece of work.
#[derive(Debug)]
pub struct Job<T> {
    handle: Option<JoinHandle<T>>,
}

impl<T> Default for Job<T> {
    fn default() -> Self {
        Self { handle: None }
    }
}

impl<T: Send + 'static> Job<T> {
    /// Returns true if no work is running and no result waits.
    pub fn is_idle(&self) -> bool {
        self.handle.is_none()
    }

    /// Starts work, unless work is running. Drops a waiting result. The caller must be within a
    /// tokio runtime.
    pub fn start(&mut self, work: impl FnOnce() -> T + Send + 'static) {
        if self.handle.as_ref().is_none_or(JoinHandle::is_finished) {
            self.handle = Some(spawn_blocking(work));
        }
    }

    /// Waits for the result; waits for ever if there is no work. Cancel safe: the work continues.
    ///
    /// # Errors
    ///
    /// The work panicked, or the runtime shut down.
    pub async fn next(&mut self) -> Result<T, JoinError> {
        let Some(handle) = &mut self.handle else {
            return future::pending().await;
        };
        let result = handle.await;
        self.handle = None;
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Polls once and drops the future, as `select!` does when another future is ready.
    async fn cancel(job: &mut Job<u32>) {
        tokio::select! {
            biased;
            _ = job.next() => panic!("the work cannot be done"),
            () = future::ready(()) => {}
        }
    }

    #[tokio::test]
    async fn work_is_done_once_however_often_the_wait_is_cancelled() {
        let (begin, may_begin) = mpsc::channel::<()>();
        let mut job = Job::default();
        job.start(move || {
            may_begin.recv().unwrap();
            1
        });
        for _ in 0..1000 {
            cancel(&mut job).await;
            job.start(|| panic!("a second piece of work"));
        }
        begin.send(()).unwrap();
        assert_eq!(job.next().await.unwrap(), 1);
        assert!(job.is_idle());
        job.start(|| 2);
        assert_eq!(job.next().await.unwrap(), 2);
    }

    #[tokio::test]
    async fn work_that_panics_is_told() {
        let mut job: Job<u32> = Job::default();
        job.start(|| panic!("as it happens"));
        assert!(job.next().await.unwrap_err().is_panic());
        assert!(job.is_idle());
    }
}
