//! Why a migration, a claim of an address or a relay session ends: a code for programs and a sentence for
//! people.

use alloc::string::String;
use core::fmt;

use minicbor::{Decode, Encode};

/// Number of a reason, for programs. The numbers never change. A receiver passes on numbers that it does
/// not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
#[cbor(transparent)]
pub struct Code(#[n(0)] pub u16);

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $number:literal $text:literal;)*) => {
        impl Code {
            $($(#[$doc])* pub const $name: Self = Self($number);)*

            /// All codes of this version.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Returns the code's name, as `--json` shows the code; `None` for a code of a later
            /// version.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($number => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    /// The sender gives no code; the sentence is all there is.
    UNSPECIFIED = 0 "unspecified";
    /// A message cannot be decoded, or a field is out of range.
    MALFORMED = 1 "malformed";
    /// The receiver does not understand such a message, or not from this sender.
    UNSUPPORTED = 2 "unsupported";
    /// A policy does not allow the request.
    NOT_PERMITTED = 3 "not-permitted";
    /// The sender asks too often.
    TOO_OFTEN = 4 "too-often";
    /// A limit of the configuration is reached.
    LIMIT = 5 "limit";
    /// The named domain is not the one that is known.
    UNKNOWN_DOMAIN = 6 "unknown-domain";
    /// The domain does not run where the request needs it.
    DOMAIN_STATE = 7 "domain-state";
    /// The named source or destination host is not one of the peers.
    UNKNOWN_HOST = 8 "unknown-host";
    /// Another migration of the domain is in progress, or has replaced this one.
    OTHER_MIGRATION = 9 "other-migration";
    /// The request's transaction is not known.
    UNKNOWN_TRANSACTION = 10 "unknown-transaction";
    /// A host, an agent or a hypervisor cannot be reached.
    UNREACHABLE = 11 "unreachable";
    /// An answer did not come in time.
    TIMED_OUT = 12 "timed-out";
    /// Somebody cancelled the migration.
    CANCELLED = 13 "cancelled";
    /// libvirt failed the migration.
    HYPERVISOR = 14 "hypervisor";
    /// The memory cannot be encrypted in transit.
    NOT_ENCRYPTED = 15 "not-encrypted";
    /// Another node has the address, or had it until recently.
    ADDRESS_TAKEN = 16 "address-taken";
    /// The address is outside the destination's prefix.
    ADDRESS_OFF_LINK = 17 "address-off-link";
    /// The multicast address or its filter cannot be relayed.
    NOT_RELAYED = 18 "not-relayed";
    /// The session is no longer needed.
    RELEASED = 19 "released";
    /// The receiver failed to do what it accepted.
    FAILED = 20 "failed";
}

impl Code {
    /// Returns true if another address of the VM may be accepted.
    pub fn wants_another_address(self) -> bool {
        matches!(self, Self::ADDRESS_TAKEN | Self::ADDRESS_OFF_LINK)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Body of `MigrationAbort`, `RelayRelease` and `Error`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Reason {
    /// One sentence for a person, at most [`MAX_TEXT_BYTES`](super::MAX_TEXT_BYTES).
    #[cbor(n(0), decode_with = "super::bounded::text")]
    pub text: String,
    /// Code of the reason. Senders of former versions omit the field.
    #[cbor(n(1), default)]
    pub code: Code,
}

impl Reason {
    /// Returns a reason of this code and this sentence.
    pub fn new(code: Code, text: impl Into<String>) -> Self {
        let text = text.into();
        Self { text, code }
    }

    /// Returns a reason without a code, as senders of former versions give.
    pub fn unspecified(text: impl Into<String>) -> Self {
        Self::new(Code::UNSPECIFIED, text)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn codes_are_numbered_without_gaps_and_have_names_of_their_own() {
        for (number, code) in Code::ALL.iter().enumerate() {
            assert_eq!(usize::from(code.0), number);
            let named = Code::ALL.iter().filter(|it| it.name() == code.name());
            assert_eq!(named.count(), 1, "{code}");
        }
    }

    #[test]
    fn reason_without_a_code_is_one_of_a_former_version() {
        let bytes = minicbor::to_vec(["No"]).unwrap();
        let reason: Reason = minicbor::decode(&bytes).unwrap();
        assert_eq!(reason, Reason::new(Code::UNSPECIFIED, "No"));
    }

    #[test]
    fn code_of_a_later_version_is_passed_on() {
        let reason = Reason::new(Code(999), "No");
        let bytes = minicbor::to_vec(&reason).unwrap();
        assert_eq!(minicbor::decode::<Reason>(&bytes).unwrap(), reason);
        assert_eq!(reason.code.name(), None);
        assert_eq!(reason.code.to_string(), "999");
    }
}
