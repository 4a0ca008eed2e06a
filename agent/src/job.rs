//! Work that blocks, on a thread of its own: one piece at a time, and kept until it ends.
//!
//! What waits in a `select!` is dropped whenever something else is ready. Work that was begun there and
//! dropped would go on unseen, and be begun again beside it, as often as anybody can raise an event.

use std::future;

use tokio::task::{JoinError, JoinHandle, spawn_blocking};

/// At most one piece of work.
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
    /// Whether there is neither work nor a result that nobody has taken.
    pub fn is_idle(&self) -> bool {
        self.handle.is_none()
    }

    /// Begins work, unless some is being done. A result that nobody has taken is dropped. Must be
    /// called in a tokio runtime.
    pub fn start(&mut self, work: impl FnOnce() -> T + Send + 'static) {
        if self.handle.as_ref().is_none_or(JoinHandle::is_finished) {
            self.handle = Some(spawn_blocking(work));
        }
    }

    /// Waits for the result; for ever where there is no work. Can be cancelled: the work goes on.
    ///
    /// # Errors
    ///
    /// When the work has panicked, or was cut off because the runtime shuts down.
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

    /// Does one step of waiting, as a `select!` does that something else has won.
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
