//! Takes everything away that outlives an agent: links, maps, filters, qdiscs.

use std::path::Path;

use super::DatapathError;
use super::filter::Filters;
use super::pins::Pins;

/// Removes what an agent with this pin root has left, from all interfaces of the network namespace
/// of the calling thread; returns the number of filters. The pins may be gone already.
///
/// # Errors
///
/// [`DatapathError::InUse`] while an agent runs; [`DatapathError::Pin`],
/// [`DatapathError::TrafficControl`].
pub fn cleanup(pin_root: &Path) -> Result<usize, DatapathError> {
    let pins = match pin_root.exists() {
        true => Some(Pins::open_to_remove(pin_root)?),
        false => None,
    };
    let removed = Filters::open(pin_root)
        .map_err(DatapathError::TrafficControl)?
        .remove_all()
        .map_err(DatapathError::from_refusal)?;
    if let Some(pins) = pins {
        pins.remove_all()?;
    }
    Ok(removed)
}
