//! What the unit tests share with the integration tests.

#[path = "../../tests/support/frame.rs"]
pub(crate) mod frame;
#[path = "../../tests/support/store.rs"]
pub(crate) mod store;
