//! How long the loop takes for its turns. What comes meanwhile waits, so a long turn is a stall for all.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;

/// A turn that takes so long is counted as a stall.
const STALL: Duration = Duration::from_millis(50);

/// The turns since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turns {
    /// The longest one.
    pub(super) longest: Duration,
    /// How many were stalls.
    pub(super) stalls: u64,
}

impl Turns {
    /// Takes in how long one has taken.
    pub(super) fn add(&mut self, took: Duration) {
        self.longest = self.longest.max(took);
        self.stalls += u64::from(took >= STALL);
    }
}

/// Waits for a future; returns also when the last poll began. With a `select!` that is when an event was
/// there, before its handler ran.
pub(super) async fn woken<F: Future>(future: F) -> (Instant, F::Output) {
    let mut future = pin!(future);
    poll_fn(|context| {
        let begun = Instant::now();
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready((begun, output)),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn long_turns_are_counted_and_the_longest_is_kept() {
        let mut turns = Turns::default();
        for took in [3, 49, 50, 70, 5] {
            turns.add(ms(took));
        }
        assert_eq!((turns.longest, turns.stalls), (ms(70), 2));
    }

    #[tokio::test]
    async fn waiting_is_no_part_of_a_turn_and_the_handler_is() {
        let mut polls = Vec::new();
        let (begun, ()) = woken(poll_fn(|context| {
            polls.push(Instant::now());
            if polls.len() == 3 {
                return Poll::Ready(());
            }
            context.waker().wake_by_ref();
            Poll::Pending
        }))
        .await;
        assert!(polls[1] <= begun && begun <= polls[2]);
    }
}
