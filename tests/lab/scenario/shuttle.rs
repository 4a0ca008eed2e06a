//! One guest under streams, moved to and fro; each move is a row of its own.

use anyhow::{Context, Result, bail};

use super::Testbed;
use super::mover::Mover;
pub use super::party::Moves;
use super::party::{Party, Viewer};
use super::sessions::Sessions;
use super::stream::Streams;

/// A guest that receives, and where it is.
pub struct Shuttle<'a> {
    testbed: &'a mut Testbed,
    party: Party,
    /// Where the lab has mobility.
    sessions: Option<Sessions>,
}

impl<'a> Shuttle<'a> {
    /// Boots the guest on the first VM host, and lets it receive.
    ///
    /// # Errors
    ///
    /// When a step fails.
    pub fn begin(testbed: &'a mut Testbed, streams: impl Into<Streams>) -> Result<Self> {
        testbed.boot()?;
        let guest = testbed.guest()?.clone();
        let viewer = Viewer::new(testbed.domain_name(), guest, streams.into(), 0);
        let party = Party::begin(testbed, vec![viewer])?;
        let sessions = testbed.converse()?;
        Ok(Self {
            testbed,
            party,
            sessions,
        })
    }

    /// Lets the guest that runs receive again, wherever it is, after [`Shuttle::finish`].
    ///
    /// # Errors
    ///
    /// When no guest runs, or on more than one VM host, or a step fails.
    pub fn resume(testbed: &'a mut Testbed, streams: impl Into<Streams>) -> Result<Self> {
        let hosts = testbed.running_on();
        let [host] = hosts[..] else {
            bail!("The guest should run on one VM host but runs on {hosts:?}");
        };
        let at = usize::from(host != testbed.lab().vms1().name());
        let guest = testbed.guest()?.clone();
        let viewer = Viewer::new(testbed.domain_name(), guest, streams.into(), at);
        let party = Party::begin(testbed, vec![viewer])?;
        let sessions = testbed.converse()?;
        Ok(Self {
            testbed,
            party,
            sessions,
        })
    }

    /// The lab, its guest and its agents.
    pub fn testbed(&mut self) -> &mut Testbed {
        self.testbed
    }

    /// Moves the guest to the other VM host.
    ///
    /// # Errors
    ///
    /// When the move fails, or the guest does not run there and only there after it.
    pub fn go(&mut self, mover: Mover) -> Result<()> {
        self.party.go(self.testbed, mover)
    }

    /// Lets the guest stay where it is, for a row that shows what the lab itself loses.
    ///
    /// # Errors
    ///
    /// When the guest does not answer, or a sender does not rest.
    pub fn stay(&mut self) -> Result<()> {
        self.party.stay(self.testbed)
    }

    /// The sessions with the correspondent, where the lab has mobility.
    pub fn sessions(&self) -> Option<&Sessions> {
        self.sessions.as_ref()
    }

    /// Ends the streams, and counts.
    ///
    /// # Errors
    ///
    /// When a sender failed, or nothing arrived.
    pub fn finish(self) -> Result<Moves> {
        let mut moves = self.party.finish()?.pop().context("There is one guest")?;
        if let Some(sessions) = self.sessions {
            let rows = moves.rows.into_iter().zip(&moves.windows);
            moves.rows = rows
                .map(|(row, window)| sessions.fill(row, *window))
                .collect();
        }
        Ok(moves)
    }
}
