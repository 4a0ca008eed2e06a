//! Generation of a node at its enrollment.

use std::net::Ipv6Addr;

use crate::value::Prefix;

/// Reason why a node cannot be enrolled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EnrollError {
    /// The HoA is not in the home prefix.
    #[error("{hoa} cannot be a HoA: it is not in the home prefix {home}")]
    Foreign {
        /// Requested address of the node.
        hoa: Ipv6Addr,
        /// Home prefix from the configuration.
        home: Prefix,
    },
    /// The HoA is the first address of the home prefix.
    #[error("{hoa} cannot be a HoA: routers take it for their own (RFC 4291 §2.6.1)")]
    Anycast {
        /// Requested address of the node.
        hoa: Ipv6Addr,
    },
    /// The server knows a newer generation.
    #[error("Generation {generation} of {hoa} was replaced; the server knows {known}")]
    Replaced {
        /// Home address of the node.
        hoa: Ipv6Addr,
        /// Requested generation.
        generation: u32,
        /// Known generation.
        known: u32,
    },
    /// No generation is left.
    #[error("{hoa} has had all its generations")]
    Exhausted {
        /// Home address of the node.
        hoa: Ipv6Addr,
    },
}

/// Returns the generation for an enrollment: the requested one, or else the next.
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
