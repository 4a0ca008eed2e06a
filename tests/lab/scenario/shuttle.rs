//! One guest under streams that migrates back and forth; each migration has a row of its own.

use anyhow::{Context, Result, bail};

use super::Testbed;
use super::mover::Mover;
pub use super::party::Moves;
use super::party::{Party, Viewer};
use super::sessions::Sessions;
use super::stream::Streams;

/// A guest that receives streams, and its VM host.
pub struct Shuttle<'a> {
    testbed: &'a mut Testbed,
    party: Party,
    /// Sessions with the correspondent, if the lab has mobility.
    sessions: Option<Sessions>,
}

impl<'a> Shuttle<'a> {
    /// Boots the guest on the first VM host, and starts its receivers and sessions.
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

    /// Starts receivers and sessions of a guest that runs already, for example after
    /// [`Shuttle::finish`].
    ///
    /// # Errors
    ///
    /// When the guest runs on no VM host or on several, or a step fails.
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

    /// Returns the testbed, for actions between two migrations.
    pub fn testbed(&mut self) -> &mut Testbed {
        self.testbed
    }

    /// Migrates the guest to the other VM host.
    ///
    /// # Errors
    ///
    /// When the migration fails. Also when, after the migration, the guest does not run on its
    /// destination or runs on both VM hosts.
    pub fn go(&mut self, mover: Mover) -> Result<()> {
        self.party.go(self.testbed, mover)
    }

    /// Measures a window without a migration, for a row that shows the lab's own losses.
    ///
    /// # Errors
    ///
    /// When the guest does not answer, or a sender does not pause.
    pub fn stay(&mut self) -> Result<()> {
        self.party.stay(self.testbed)
    }

    /// Returns the sessions with the correspondent; `None` if the lab has no mobility.
    pub fn sessions(&self) -> Option<&Sessions> {
        self.sessions.as_ref()
    }

    /// Ends the streams and returns the results.
    ///
    /// # Errors
    ///
    /// When a sender failed, or the guest received nothing of a stream.
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
