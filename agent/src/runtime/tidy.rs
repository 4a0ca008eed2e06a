//! Removal of map entries that nothing uses any more.

use std::error::Error;
use std::time::Duration;

use crate::clock::now;
use crate::datapath::Datapath;

/// Removes unused entries. Reads whole maps.
pub(super) fn tidy(datapath: &Datapath, flow_silence: Duration) {
    match datapath.collect(now(), flow_silence) {
        Ok(collected) => tracing::debug!(?collected, "Maps tidied"),
        Err(error) => tracing::warn!(
            error = &error as &dyn Error,
            "Cannot tidy the maps; they may fill up"
        ),
    }
}
