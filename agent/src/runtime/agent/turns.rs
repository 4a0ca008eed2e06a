//! Duration of the loop's turns. Everything that arrives during a turn waits, so a long turn stalls
//! the whole agent.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;

/// Shortest turn that counts as a stall.
const STALL: Duration = Duration::from_millis(50);

/// Turns of the loop since the start of the process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turns {
    /// Duration of the longest turn so far.
    pub(super) longest: Duration,
    /// Number of turns of at least [`STALL`].
    pub(super) stalls: u64,
}

impl Turns {
    /// Adds the duration of one turn.
    pub(super) fn add(&mut self, took: Duration) {
        self.longest = self.longest.max(took);
        self.stalls += u64::from(took >= STALL);
    }
}

/// Waits for a future; also returns the start of its last poll. For a `select!` this is the time
/// when an event was ready, before its handler ran.
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
