//! What libvirt's errors mean here.

use virt::error::{Error, ErrorNumber};

/// Whether the domain is gone.
pub(super) fn is_no_domain(error: &Error) -> bool {
    error.code() == ErrorNumber::NoDomain.into()
}
