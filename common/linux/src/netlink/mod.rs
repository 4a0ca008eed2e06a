//! Requests to the kernel, and notices from the kernel, by rtnetlink (RFC 3549).
//!
//! [`Netlink`] sends requests; the kernel answers within the call. A request is a typed message of
//! netlink-packet-route, or bytes ([`bytes`]) where the crate has no type. [`Notices`] receives the
//! notices of changes.

pub mod bytes;
mod notices;
mod refusal;
mod requests;

#[cfg(feature = "tokio")]
pub use notices::AsyncNotices;
pub use notices::{Group, Heard, Notices};
pub use refusal::{Refusal, RequestError};
pub use requests::{Netlink, serialized, typed};
