//! Counters of one flow, by path.

use common::maps::{Origin, StreamUsage};

/// Counters of one flow on both paths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    /// Packets that arrived natively.
    pub native: StreamUsage,
    /// Packets that arrived from relays.
    pub relay: StreamUsage,
}

impl Stream {
    /// Returns the counters of one path.
    pub fn by(&self, origin: Origin) -> &StreamUsage {
        match origin {
            Origin::Native => &self.native,
            Origin::Relay => &self.relay,
        }
    }

    /// Returns the counters of the path of the last packet.
    pub fn latest(&self) -> &StreamUsage {
        if self.relay.last_ns > self.native.last_ns {
            &self.relay
        } else {
            &self.native
        }
    }

    /// Returns the packets of both paths that did not pass.
    pub fn dropped(&self) -> u64 {
        self.native.dropped + self.relay.dropped
    }
}
