//! Escaping of text that others chose, for display to a person.
//!
//! Names of domains, peers and interfaces may contain anything: line breaks that forge log lines,
//! sequences that control a terminal, marks that reverse the direction of text.

use core::fmt::{self, Write as _};

/// Whether a character is safe to show: it has a glyph and does not move the cursor.
pub fn is_plain(character: char) -> bool {
    !(character.is_control()
        || matches!(
            character,
            // Soft hyphen, direction marks and isolates, joiners, line separators, and Unicode's
            // annotation and tag characters.
            '\u{ad}'
                | '\u{61c}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{e0000}'..='\u{e007f}'
        ))
}

/// Whether [`is_plain`] holds for all characters of a text.
pub fn is_plain_text(text: &str) -> bool {
    text.chars().all(is_plain)
}

/// Displays a text with Rust's escapes for characters that are not plain.
#[derive(Clone, Copy, Debug)]
pub struct Escaped<'a>(pub &'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            if is_plain(character) {
                f.write_char(character)?;
            } else {
                write!(f, "{}", character.escape_default())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::format;
    use std::string::ToString;

    use super::*;

    #[test]
    fn text_of_any_language_is_shown_as_it_is() {
        for text in ["viewer-1", "größe", "視聴者", "עברית", "a\\b \"c\"", ""] {
            assert!(is_plain_text(text), "{text}");
            assert_eq!(Escaped(text).to_string(), text);
        }
    }

    #[test]
    fn what_moves_the_cursor_or_hides_is_escaped() {
        for (text, shown) in [
            ("a\nb", r"a\nb"),
            ("a\tb\r", r"a\tb\r"),
            ("\u{1b}[31mred", r"\u{1b}[31mred"),
            ("\u{9b}2J", r"\u{9b}2J"),
            ("a\u{202e}b", r"a\u{202e}b"),
            ("a\u{2066}b\u{200f}", r"a\u{2066}b\u{200f}"),
            ("a\u{2028}b", r"a\u{2028}b"),
            ("\u{7f}\u{0}", r"\u{7f}\u{0}"),
        ] {
            assert!(!is_plain_text(text), "{text:?}");
            assert_eq!(format!("{}", Escaped(text)), shown);
        }
    }
}
