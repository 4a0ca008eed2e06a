//! Fixtures that unit tests and integration tests share.

#[path = "../../tests/support/frame.rs"]
pub(crate) mod frame;
#[path = "../../tests/support/store.rs"]
pub(crate) mod store;
