//! Values that configuration, protocol, hypervisor and network share. A value that exists is valid: each
//! type checks the text that it is made from.

mod name;
mod peer_address;
mod prefix;
mod timestamp;

pub use name::{InterfaceName, Name};
pub use peer_address::PeerAddress;
pub use prefix::Prefix;
pub use timestamp::Timestamp;

/// Why a value is refused. The reader of the file adds line and key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// The text is not the name of an agent.
    #[error("\"{0}\" is no agent name; use 1 to 63 letters, digits, '.', '-' and '_'")]
    Name(String),
    /// The text is not the name of an interface.
    #[error("\"{0}\" is no interface name; use 1 to 15 characters without space, '/' and ':'")]
    Interface(String),
    /// The text is not a prefix.
    #[error("\"{0}\" is no IPv6 prefix; write it like 2001:db8:2::/64")]
    Prefix(String),
    /// The text is not a peer's address.
    #[error("\"{0}\" is no peer address; write 2001:db8::2, [2001:db8::2]:47411 or a DNS name")]
    PeerAddress(String),
}
