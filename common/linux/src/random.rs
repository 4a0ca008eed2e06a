//! Random numbers of the kernel.
//!
//! Each number is asked for when needed: a machine that is resumed from a snapshot, or copied, would give
//! the same numbers twice from a generator of its own.

use std::io;

use common::mat::entropy::Entropy;

/// Random bytes.
///
/// # Errors
///
/// What `getrandom(2)` says.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// A number that nobody else has.
///
/// # Errors
///
/// What `getrandom(2)` says.
pub fn number() -> io::Result<u64> {
    Ok(getrandom::u64()?)
}

/// The kernel as the source of what MAT seals with.
pub fn entropy() -> Entropy {
    Entropy::new(|bytes| getrandom::fill(bytes).is_ok())
}
