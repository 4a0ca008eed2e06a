//! Requests to the kernel and its notices, by rtnetlink (RFC 3549).
//!
//! [`Netlink`] sends requests, which the kernel answers within the call. Requests are typed messages of
//! netlink-packet-route, or bytes ([`bytes`]) where the crate has no type. [`Notices`] hears of changes.

pub mod bytes;
mod notices;
mod refusal;
mod requests;

#[cfg(feature = "tokio")]
pub use notices::AsyncNotices;
pub use notices::{Group, Heard, Notices};
pub use refusal::{Refusal, RequestError};
pub use requests::{Netlink, serialized, typed};
