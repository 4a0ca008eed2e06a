//! What is known of one flow, by the ways that it comes.

use common::maps::{Origin, StreamUsage};

/// One flow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    /// What came natively.
    pub native: StreamUsage,
    /// What came from relays.
    pub relay: StreamUsage,
}

impl Stream {
    /// What came by one way.
    pub fn by(&self, origin: Origin) -> &StreamUsage {
        match origin {
            Origin::Native => &self.native,
            Origin::Relay => &self.relay,
        }
    }

    /// The way that the last packet came by.
    pub fn latest(&self) -> &StreamUsage {
        if self.relay.last_ns > self.native.last_ns {
            &self.relay
        } else {
            &self.native
        }
    }

    /// Packets that did not pass.
    pub fn dropped(&self) -> u64 {
        self.native.dropped + self.relay.dropped
    }
}
