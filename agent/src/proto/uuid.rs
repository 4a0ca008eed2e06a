//! UUID of a domain, the same on both hosts.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// UUID of a libvirt domain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainUuid(pub [u8; 16]);

impl fmt::Display for DomainUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for DomainUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Error of a text that is not a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("This is no UUID; write it as `virsh domuuid` does")]
pub struct UuidError;

impl FromStr for DomainUuid {
    type Err = UuidError;

    /// Parses the form of [`fmt::Display`], in either case.
    fn from_str(text: &str) -> Result<Self, UuidError> {
        let text = text.as_bytes();
        let mut uuid = [0; 16];
        let mut digits = text
            .iter()
            .enumerate()
            .filter(|(at, _)| !matches!(at, 8 | 13 | 18 | 23))
            .map(|(_, digit)| char::from(*digit).to_digit(16));
        for byte in &mut uuid {
            let (Some(Some(high)), Some(Some(low))) = (digits.next(), digits.next()) else {
                return Err(UuidError);
            };
            *byte = u8::try_from(high * 16 + low).map_err(|_| UuidError)?;
        }
        let dashes = [8, 13, 18, 23].map(|at| text.get(at));
        if digits.next().is_some() || dashes != [Some(&b'-'); 4] {
            return Err(UuidError);
        }
        Ok(Self(uuid))
    }
}

impl TryFrom<String> for DomainUuid {
    type Error = UuidError;

    fn try_from(text: String) -> Result<Self, UuidError> {
        text.parse()
    }
}

impl From<DomainUuid> for String {
    fn from(uuid: DomainUuid) -> Self {
        uuid.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "01234567-89ab-cdef-0123-456789abcdef";

    #[test]
    fn uuid_is_read_in_either_case() {
        let uuid: DomainUuid = TEXT.parse().unwrap();
        assert_eq!(uuid.to_string(), TEXT);
        assert_eq!(TEXT.to_uppercase().parse(), Ok(uuid));
    }

    #[test]
    fn anything_but_digits_and_dashes_in_their_places_is_refused() {
        for text in [
            "",
            &TEXT[1..],
            &format!("{TEXT}0"),
            &TEXT.replace('-', ""),
            &TEXT.replace('-', "+"),
            &TEXT.replace('c', "g"),
            &TEXT.replace("01", "+1"),
        ] {
            assert_eq!(text.parse::<DomainUuid>(), Err(UuidError), "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_uuid_survives_its_text(bytes: [u8; 16]) {
            let uuid = DomainUuid(bytes);
            prop_assert_eq!(uuid.to_string().parse(), Ok(uuid));
        }

        #[test]
        fn any_text_is_read_or_refused(text: String) {
            let _ = text.parse::<DomainUuid>();
        }
    }
}
