//! Interpretation of libvirt's errors.

use virt::error::{Error, ErrorNumber};

/// Whether the error means that the domain no longer exists.
pub(super) fn is_no_domain(error: &Error) -> bool {
    error.code() == ErrorNumber::NoDomain.into()
}
