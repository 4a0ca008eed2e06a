//! Random numbers from the kernel (`getrandom(2)`).
//!
//! Each number is requested when it is needed. A generator in the process would repeat its numbers
//! on a machine that is copied or resumed from a snapshot.

use std::io;

use common::mat::entropy::Entropy;

/// Returns `N` random bytes.
///
/// # Errors
///
/// The error of `getrandom(2)`.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// Returns a random number, unique with overwhelming probability.
///
/// # Errors
///
/// The error of `getrandom(2)`.
pub fn number() -> io::Result<u64> {
    Ok(getrandom::u64()?)
}

/// Returns the kernel as the entropy source of MAT's encryption.
pub fn entropy() -> Entropy {
    Entropy::new(|bytes| getrandom::fill(bytes).is_ok())
}
