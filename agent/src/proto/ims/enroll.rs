//! Which generation a node is enrolled with.

use std::net::Ipv6Addr;

use crate::value::Prefix;

/// Why a node cannot be enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnrollError {
    /// Not in the home prefix.
    #[error("{hoa} cannot be a HoA: it is not in the home prefix {home}")]
    Foreign {
        /// What was named.
        hoa: Ipv6Addr,
        /// The home prefix.
        home: Prefix,
    },
    /// The first address of the home prefix.
    #[error("{hoa} cannot be a HoA: routers take it for their own (RFC 4291 §2.6.1)")]
    Anycast {
        /// What was named.
        hoa: Ipv6Addr,
    },
    /// A newer generation is known.
    #[error("Generation {generation} of {hoa} was replaced; the server knows {known}")]
    Replaced {
        /// The HoA.
        hoa: Ipv6Addr,
        /// What was asked for.
        generation: u32,
        /// What is known.
        known: u32,
    },
    /// There is none.
    #[error("{hoa} has had all its generations")]
    Exhausted {
        /// The HoA.
        hoa: Ipv6Addr,
    },
}

/// The generation that a node is enrolled with: the one that is asked for, or else the next.
///
/// # Errors
///
/// [`EnrollError`].
pub fn next_generation(
    home: Prefix,
    hoa: Ipv6Addr,
    known: u32,
    asked: Option<u32>,
) -> Result<u32, EnrollError> {
    if !home.contains(hoa) {
        return Err(EnrollError::Foreign { hoa, home });
    }
    if hoa == home.address {
        return Err(EnrollError::Anycast { hoa });
    }
    match asked {
        Some(generation) if generation < known.max(1) => Err(EnrollError::Replaced {
            hoa,
            generation,
            known,
        }),
        Some(generation) => Ok(generation),
        None => known.checked_add(1).ok_or(EnrollError::Exhausted { hoa }),
    }
}
