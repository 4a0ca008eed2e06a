//! Finds retired words: private words for which the field has a term of its own.

use syn::visit::{self, Visit};

use super::Finding;
use super::source::Source;

/// Retired identifiers and their replacements.
const IDENTIFIERS: &[(&str, &str)] = &[
    ("Front", "HeaderView"),
    ("Follow", "ChecksumFixup"),
    ("unhoused_datagrams", "datagrams_without_domain"),
    ("unhoused", "without_domain"),
    ("Nobody", "External"),
    ("unfinished", "partial_checksum"),
    ("may_be_unfinished", "may_be_partial"),
    ("update_finished", "update_full"),
    ("update_finished_checksum", "update_full_checksum"),
    ("update_sum", "update_csum"),
];

/// Retired phrases of comments, in lower case, and their replacements.
const PHRASES: &[(&str, &str)] = &[
    ("unhoused", "without a domain"),
    ("by which way", "the path"),
    ("that which", "what"),
    ("unfinished checksum", "partial checksum"),
];

/// Finds retired identifiers and phrases.
pub(super) fn check(source: &Source) -> Vec<Finding> {
    // This file names the retired words.
    if source.file.ends_with("xtask/src/lint/words.rs") {
        return Vec::new();
    }
    let mut identifiers = Identifiers(Vec::new());
    identifiers.visit_file(&source.syntax);
    let finding = |line, word: &str, instead: &str| Finding {
        file: source.file.clone(),
        line,
        message: format!("\"{word}\" is retired; write {instead:?}"),
    };
    let of_code = identifiers
        .0
        .into_iter()
        .map(|(line, (word, instead))| finding(line, word, instead));
    let of_text = source.text.lines().enumerate().flat_map(|(index, line)| {
        let comment = line.find("//").and_then(|at| line.get(at..));
        let comment = comment.unwrap_or_default().to_lowercase();
        let retired = PHRASES
            .iter()
            .filter(move |(phrase, _)| comment.contains(phrase));
        retired.map(move |(phrase, instead)| (index + 1, *phrase, *instead))
    });
    of_code
        .chain(of_text.map(|(line, phrase, instead)| finding(line, phrase, instead)))
        .collect()
}

struct Identifiers(Vec<(usize, (&'static str, &'static str))>);

impl<'ast> Visit<'ast> for Identifiers {
    fn visit_ident(&mut self, ident: &'ast syn::Ident) {
        if let Some(retired) = IDENTIFIERS.iter().find(|(word, _)| ident == word) {
            self.0.push((ident.span().start().line, *retired));
        }
        visit::visit_ident(self, ident);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lint::parsed;

    #[test]
    fn retired_words_are_found_in_code_and_comments() {
        let text = "//! What is unhoused.\nstruct Front;\nfn f() -> Front { Front }\n";
        let found: Vec<String> = check(&parsed("common/src/front.rs", text))
            .iter()
            .map(|it| format!("{}: {}", it.line, it.message))
            .collect();
        let front = "\"Front\" is retired; write \"HeaderView\"";
        let mut expected = vec![
            format!("2: {front}"),
            format!("3: {front}"),
            format!("3: {front}"),
        ];
        expected.push("1: \"unhoused\" is retired; write \"without a domain\"".to_owned());
        assert_eq!(found, expected);
    }

    #[test]
    fn words_that_contain_a_retired_one_are_others() {
        let text = "struct Frontier; fn follow() {}";
        assert_eq!(check(&parsed("common/src/front.rs", text)), []);
    }
}
