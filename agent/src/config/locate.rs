//! Finds the line and the dotted key of an error in a file.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

/// Returns the line (from 1) and the dotted key at a byte range of `text`.
pub(super) fn of_span(text: &str, span: Range<usize>) -> (usize, String) {
    let (table, _) = DeTable::parse_recoverable(text);
    let mut path = Vec::new();
    descend(table.get_ref(), &span, &mut path);
    (line(text, span.start), path.join("."))
}

/// Returns line and dotted key of the value at `path`, or of its nearest parent in the file.
pub(super) fn of_path(text: &str, path: &[String]) -> (usize, String) {
    let (table, _) = DeTable::parse_recoverable(text);
    let mut keys = path.iter();
    let mut offset = 0;
    let mut value = keys
        .next()
        .and_then(|key| table.get_ref().get(key.as_str()));
    while let Some(found) = value {
        offset = found.span().start;
        value = keys.next().and_then(|key| match found.get_ref() {
            DeValue::Table(table) => table.get(key.as_str()),
            DeValue::Array(array) => key.parse().ok().and_then(|i: usize| array.get(i)),
            _ => None,
        });
    }
    (line(text, offset), path.join("."))
}

/// Follows the tables and arrays that enclose `span`. A key at `span` (an unknown key) ends the
/// path.
fn descend(table: &DeTable<'_>, span: &Range<usize>, path: &mut Vec<String>) {
    for (key, _) in table {
        if key.span() == *span {
            path.push(key.get_ref().to_string());
            return;
        }
    }
    for (key, value) in table {
        let mut step = path.clone();
        step.push(key.get_ref().to_string());
        if enter(value.get_ref(), value.span(), span, &mut step) {
            *path = step;
            return;
        }
    }
}

fn enter(
    value: &DeValue<'_>,
    at: Range<usize>,
    span: &Range<usize>,
    path: &mut Vec<String>,
) -> bool {
    match value {
        DeValue::Table(table) => {
            let before = path.len();
            descend(table, span, path);
            path.len() > before || at == *span
        }
        DeValue::Array(array) => {
            for (i, element) in array.iter().enumerate() {
                let mut step = path.clone();
                step.push(i.to_string());
                if enter(element.get_ref(), element.span(), span, &mut step) {
                    *path = step;
                    return true;
                }
            }
            at == *span
        }
        _ => at == *span,
    }
}

fn line(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
    before.iter().filter(|&&byte| byte == b'\n').count() + 1
}

/// Returns a message on one line, with a capital first letter.
pub(super) fn sentence(message: &str) -> String {
    let message = message.trim().replace('\n', "; ");
    let mut letters = message.chars();
    match letters.next() {
        Some(first) => first.to_uppercase().chain(letters).collect(),
        None => message,
    }
}
