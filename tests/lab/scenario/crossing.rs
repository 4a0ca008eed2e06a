//! Two guests under streams, one on each VM host, that migrate to each other's VM host at the same
//! time.

use anyhow::{Result, anyhow};

use super::Testbed;
use super::mover::Mover;
use super::party::{Moves, Party, Viewer};
use super::stream::Streams;

/// Number of the second guest.
const SECOND: u8 = 2;

/// Two guests that receive streams, one on each VM host.
pub struct Crossing<'a> {
    testbed: &'a mut Testbed,
    party: Party,
}

impl<'a> Crossing<'a> {
    /// Boots a guest on each VM host and starts their receivers. Streams with the same index are
    /// one stream, so the guests may share streams.
    ///
    /// # Errors
    ///
    /// When a step fails.
    pub fn begin(testbed: &'a mut Testbed, streams: [Streams; 2]) -> Result<Self> {
        let [first, second] = streams;
        testbed.boot()?;
        let guest = testbed.guest()?.clone();
        let first = Viewer::new(testbed.domain_name(), guest, first, 0);
        let (domain, guest) = testbed.boot_further_on(SECOND, 1)?;
        let second = Viewer::new(&domain, guest, second, 1);
        let party = Party::begin(testbed, vec![first, second])?;
        Ok(Self { testbed, party })
    }

    /// Returns the testbed, for actions between two migrations.
    pub fn testbed(&mut self) -> &mut Testbed {
        self.testbed
    }

    /// Migrates both guests to each other's VM host.
    ///
    /// # Errors
    ///
    /// When a migration fails. Also when, after the migrations, a guest does not run on its
    /// destination or runs on both VM hosts.
    pub fn go(&mut self, mover: Mover) -> Result<()> {
        self.party.go(self.testbed, mover)
    }

    /// Ends the streams and returns the results of both guests. The first results are those of the
    /// guest that began on the first VM host.
    ///
    /// # Errors
    ///
    /// When a sender failed, or a guest received nothing of a stream.
    pub fn finish(self) -> Result<[Moves; 2]> {
        let moves = self.party.finish()?;
        moves
            .try_into()
            .map_err(|_| anyhow!("There are two guests"))
    }
}
