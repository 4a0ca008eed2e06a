//! Patterns for names of domains and agents, as in the configuration.

use std::fmt;

use common::signal::MAX_TEXT_BYTES;
use serde::Deserialize;

/// Pattern for names: `*` matches any text, `?` any character.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Glob(String);

/// The text is not a valid pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is no pattern; use 1 to 255 printable characters, '*' and '?' match any")]
pub struct GlobError(String);

impl Glob {
    /// Returns the pattern that matches every name.
    pub fn any() -> Self {
        Self("*".to_owned())
    }

    /// Returns the pattern in lower case.
    pub fn to_lowercase(&self) -> Self {
        Self(self.0.to_lowercase())
    }

    /// Returns true if the pattern matches the whole of `name`.
    pub fn matches(&self, name: &str) -> bool {
        let (mut pattern, mut name) = (self.0.chars(), name.chars());
        // Where to continue after the last `*`: the rest of the pattern, and the part of the name
        // that the `*` has not matched. On a mismatch the `*` matches one character more, so the
        // product of both lengths bounds the time.
        let mut retry = None;
        loop {
            let name_before = name.clone();
            match (pattern.next(), name.next()) {
                (Some('*'), _) => {
                    name = name_before;
                    retry = Some((pattern.clone(), name.clone()));
                }
                (None, None) => return true,
                (Some('?'), Some(_)) => {}
                (Some(a), Some(b)) if a == b => {}
                _ => {
                    let Some((after_star, mut rest)) = retry else {
                        return false;
                    };
                    if rest.next().is_none() {
                        return false;
                    }
                    pattern = after_star.clone();
                    name = rest.clone();
                    retry = Some((after_star, rest));
                }
            }
        }
    }
}

/// Returns true if one of the patterns matches the name.
pub fn any_matches(globs: &[Glob], name: &str) -> bool {
    globs.iter().any(|glob| glob.matches(name))
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Glob {
    type Error = GlobError;

    fn try_from(text: String) -> Result<Self, GlobError> {
        if (1..=MAX_TEXT_BYTES).contains(&text.len()) && !text.chars().any(char::is_control) {
            Ok(Self(text))
        } else {
            Err(GlobError(text))
        }
    }
}

impl TryFrom<&str> for Glob {
    type Error = GlobError;

    fn try_from(text: &str) -> Result<Self, GlobError> {
        text.to_owned().try_into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn matches(glob: &str, name: &str) -> bool {
        Glob::try_from(glob).unwrap().matches(name)
    }

    #[test]
    fn glob_matches_as_a_shell_would() {
        for (glob, name) in [
            ("viewer", "viewer"),
            ("*", ""),
            ("*", "viewer"),
            ("view*", "viewer"),
            ("*er", "viewer"),
            ("v*w*r", "viewer"),
            ("v?ewer", "viewer"),
            ("*ab", "aab"),
            ("a**b", "ab"),
            ("a*b*c", "a-b-b-c"),
        ] {
            assert!(matches(glob, name), "{glob} should match {name:?}");
        }
        for (glob, name) in [
            ("viewer", "viewer2"),
            ("viewer", "Viewer"),
            ("?", ""),
            ("view*x", "viewer"),
            ("*ab", "aba"),
            ("a*b*c", "a-b-b-d"),
        ] {
            assert!(!matches(glob, name), "{glob} should not match {name:?}");
        }
    }

    #[test]
    fn empty_long_and_unprintable_texts_are_no_patterns() {
        let long = "a".repeat(MAX_TEXT_BYTES + 1);
        for text in ["", "a\nb", &long] {
            assert_eq!(Glob::try_from(text), Err(GlobError(text.to_owned())));
        }
    }

    /// The definition of a match: slow and simple.
    fn matches_by_definition(pattern: &[char], name: &[char]) -> bool {
        match (pattern.split_first(), name.split_first()) {
            (None, None) => true,
            (Some(('*', rest)), _) => {
                (0..=name.len()).any(|skipped| matches_by_definition(rest, &name[skipped..]))
            }
            (Some((wanted, pattern)), Some((letter, name))) => {
                (*wanted == '?' || wanted == letter) && matches_by_definition(pattern, name)
            }
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn patterns_match_as_defined(pattern in "[*?aä]{1,8}", name in "[aä]{0,10}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(
                matches(&pattern, &name),
                matches_by_definition(&chars(&pattern), &chars(&name))
            );
        }

        #[test]
        fn any_pattern_and_name_are_matched_or_not(pattern: String, name: String) {
            if let Ok(glob) = Glob::try_from(pattern) {
                let _ = glob.matches(&name);
            }
        }
    }
}
