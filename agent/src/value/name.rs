//! Names of agents and of network interfaces.

use std::fmt;

use serde::Deserialize;

use super::ValueError;

/// Longest name of an interface, bytes (`IFNAMSIZ` less the final zero).
const MAX_INTERFACE_NAME_BYTES: usize = 15;

/// Name of an agent, as in its certificate; in lower case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct Name(String);

/// Name of a network interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Deserialize)]
#[serde(try_from = "String")]
pub struct InterfaceName(String);

macro_rules! text {
    ($($name:ident),*) => {
        $(impl $name {
            /// Returns the name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        })*
    };
}
text!(Name, InterfaceName);

impl TryFrom<String> for Name {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if (1..=63).contains(&text.len()) && text.chars().all(good) {
            // Names in certificates compare without case (RFC 4343).
            Ok(Self(text.to_ascii_lowercase()))
        } else {
            Err(ValueError::Name(text))
        }
    }
}

impl TryFrom<String> for InterfaceName {
    type Error = ValueError;

    fn try_from(text: String) -> Result<Self, ValueError> {
        let good = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':');
        let fits = (1..=MAX_INTERFACE_NAME_BYTES).contains(&text.len());
        if fits && text.chars().all(good) && text != "." && text != ".." {
            Ok(Self(text))
        } else {
            Err(ValueError::Interface(text))
        }
    }
}
