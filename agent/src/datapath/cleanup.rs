//! Removes everything that outlives an agent: links, maps, filters, qdiscs.

use std::path::Path;

use super::DatapathError;
use super::filter::Filters;
use super::pins::Pins;

/// Removes everything that an agent with this pin root has left, on all interfaces of the calling
/// thread's network namespace. Returns the number of filters removed. Works also after the pins
/// were removed.
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
