//! Checks of numbers, durations and URIs during deserialization.

use std::time::Duration;

use common::signal::MAX_TEXT_BYTES;
use serde::{Deserialize, Deserializer, de};

/// Deserializes an integer in `MIN..=MAX`.
pub(super) fn ranged<'de, const MIN: u64, const MAX: u64, D, T>(d: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
{
    let number = i64::deserialize(d)?;
    u64::try_from(number)
        .ok()
        .filter(|number| (MIN..=MAX).contains(number))
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| de::Error::custom(format!("{number} is not in {MIN} to {MAX}")))
}

/// Deserializes a power of two, at most `MAX`.
pub(super) fn power_of_two<'de, const MAX: u64, D>(d: D) -> Result<u32, D::Error>
where
    D: Deserializer<'de>,
{
    ranged::<1, MAX, D, u32>(d).and_then(|number| {
        if number.is_power_of_two() {
            Ok(number)
        } else {
            Err(de::Error::custom(format!(
                "{number} is not a power of two; take {} or {}",
                number.next_power_of_two() / 2,
                number.next_power_of_two()
            )))
        }
    })
}

/// Deserializes a duration of `MIN..=MAX` milliseconds.
pub(super) fn milliseconds<'de, const MIN: u64, const MAX: u64, D>(
    d: D,
) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    ranged::<MIN, MAX, D, u64>(d).map(Duration::from_millis)
}

/// Deserializes a duration of `MIN..=MAX` seconds.
pub(super) fn seconds<'de, const MIN: u64, const MAX: u64, D>(d: D) -> Result<Duration, D::Error>
where
    D: Deserializer<'de>,
{
    ranged::<MIN, MAX, D, u64>(d).map(Duration::from_secs)
}

/// Deserializes a URI with a scheme; libvirt checks the rest.
pub(super) fn uri<'de, D>(d: D) -> Result<String, D::Error>
where
    D: Deserializer<'de>,
{
    let text = String::deserialize(d)?;
    let fits = text.len() <= MAX_TEXT_BYTES && text.chars().all(|c| c.is_ascii_graphic());
    if fits
        && text
            .split_once(':')
            .is_some_and(|(scheme, _)| !scheme.is_empty())
    {
        Ok(text)
    } else {
        Err(de::Error::custom(format!(
            "\"{text}\" is no URI; write it like qemu:///system"
        )))
    }
}

/// Deserializes a URI that may be empty.
pub(super) fn optional_uri<'de, D>(d: D) -> Result<Option<String>, D::Error>
where
    D: Deserializer<'de>,
{
    uri(d).map(Some)
}
