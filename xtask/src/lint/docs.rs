//! Finds doc lines that only repeat the name below them: `/// The peers.` over `peers`.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use super::Finding;
use super::source::Source;

/// Words without information.
const EMPTY: &[&str] = &[
    "a", "an", "the", "its", "of", "this", "that", "is", "it", "one",
];

/// Finds items whose doc comment has no word beyond the words of the item's name.
pub(super) fn check(source: &Source) -> Vec<Finding> {
    if source.is_test() {
        return Vec::new();
    }
    let mut items = Items(Vec::new());
    items.visit_file(&source.syntax);
    let repeated = items.0.into_iter().filter(|it| repeats(&it.name, &it.doc));
    repeated
        .map(|it| Finding {
            file: source.file.clone(),
            line: it.line,
            message: format!("the doc of `{}` only repeats its name", it.name),
        })
        .collect()
}

fn repeats(name: &str, doc: &str) -> bool {
    let words = |text: &str| -> Vec<String> {
        let words = text.split(|it: char| !it.is_alphanumeric());
        let words = words.map(str::to_lowercase);
        words
            .filter(|it| !it.is_empty() && !EMPTY.contains(&it.as_str()))
            .collect()
    };
    let singular = |word: &str| word.trim_end_matches('s').to_owned();
    let mut spaced = String::new();
    let mut after_lowercase = false;
    for letter in name.chars() {
        if letter.is_uppercase() && after_lowercase {
            spaced.push(' ');
        }
        after_lowercase = letter.is_lowercase();
        spaced.push(letter);
    }
    let spaced = spaced.replace('_', " ");
    let of_name: Vec<String> = words(&spaced).iter().map(|it| singular(it)).collect();
    let of_doc = words(doc);
    !doc.is_empty() && of_doc.iter().all(|it| of_name.contains(&singular(it)))
}

struct Item {
    name: String,
    doc: String,
    line: usize,
}

struct Items(Vec<Item>);

impl Items {
    fn add(&mut self, name: &syn::Ident, attributes: &[syn::Attribute]) {
        let mut lines = Vec::new();
        for attribute in attributes {
            if let syn::Meta::NameValue(meta) = &attribute.meta
                && meta.path.is_ident("doc")
                && let syn::Expr::Lit(literal) = &meta.value
                && let syn::Lit::Str(text) = &literal.lit
            {
                lines.push((text.value(), attribute.span().start().line));
            }
        }
        if let Some((_, line)) = lines.first() {
            let line = *line;
            let doc: Vec<String> = lines.into_iter().map(|(text, _)| text).collect();
            self.0.push(Item {
                name: name.to_string(),
                doc: doc.join(" "),
                line,
            });
        }
    }
}

impl<'ast> Visit<'ast> for Items {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        match item {
            syn::Item::Const(it) => self.add(&it.ident, &it.attrs),
            syn::Item::Enum(it) => self.add(&it.ident, &it.attrs),
            syn::Item::Fn(it) => self.add(&it.sig.ident, &it.attrs),
            syn::Item::Mod(it) => self.add(&it.ident, &it.attrs),
            syn::Item::Static(it) => self.add(&it.ident, &it.attrs),
            syn::Item::Struct(it) => self.add(&it.ident, &it.attrs),
            syn::Item::Trait(it) => self.add(&it.ident, &it.attrs),
            syn::Item::Type(it) => self.add(&it.ident, &it.attrs),
            _ => {}
        }
        visit::visit_item(self, item);
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        if let Some(name) = &field.ident {
            self.add(name, &field.attrs);
        }
        visit::visit_field(self, field);
    }

    fn visit_variant(&mut self, variant: &'ast syn::Variant) {
        self.add(&variant.ident, &variant.attrs);
        visit::visit_variant(self, variant);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.add(&function.sig.ident, &function.attrs);
        visit::visit_impl_item_fn(self, function);
    }

    fn visit_trait_item_fn(&mut self, function: &'ast syn::TraitItemFn) {
        self.add(&function.sig.ident, &function.attrs);
        visit::visit_trait_item_fn(self, function);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lint::parsed;

    #[test]
    fn docs_that_repeat_a_name_are_found() {
        for (name, doc) in [
            ("peers", "The peers."),
            ("PeerAddress", "An address of a peer."),
            ("SOCKET", "The socket."),
            ("address", "Its address."),
        ] {
            assert!(repeats(name, doc), "{name}: {doc}");
        }
        for (name, doc) in [
            ("peers", "Other agents, by name."),
            ("address", "Address of DstAgent."),
            ("length", "Length, bytes."),
        ] {
            assert!(!repeats(name, doc), "{name}: {doc}");
        }
    }

    #[test]
    fn fields_variants_and_functions_are_looked_at() {
        let text = "/// Server.\nstruct Server {\n/// The port.\nport: u16 }\nenum E {\n/// Lost.\nLost }\nimpl Server {\n/// Opens.\nfn opens() {} }";
        let lines: Vec<usize> = check(&parsed("agent/src/x.rs", text))
            .iter()
            .map(|it| it.line)
            .collect();
        assert_eq!(lines, [1, 3, 6, 9]);
    }
}
