//! Checks which module imports which. The rooms of a crate are its top modules, arranged in rows. A
//! room imports only from lower rows, so rooms of one row do not know each other.
//!
//! Tests and fuzz targets may import everything, because they combine the rooms.

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use super::Finding;
use super::source::Source;

/// Rows of one crate, lowest first. A module in no row belongs to the crate's roof (`main`, `cli`,
/// `fuzz`, …), which may import everything.
struct House {
    /// Folder of the crate's sources, with a slash at the end.
    folder: &'static str,
    rows: &'static [&'static [&'static str]],
}

const HOUSES: &[House] = &[
    House {
        folder: "agent/src/",
        rows: &[
            &["value", "glob", "job", "shutdown"],
            &["clock"],
            &["proto"],
            &["role"],
            &["net"],
            &["datapath", "hypervisor"],
            &["config"],
            &["control"],
            &["hook", "telemetry", "watchdog"],
            &["runtime"],
        ],
    },
    House {
        folder: "migkick/src/",
        rows: &[
            &["identifier", "netlink"],
            &["interface"],
            &["nic", "datapath"],
            &["node", "client"],
            &["net", "mobile", "view"],
            &["session"],
        ],
    },
    House {
        folder: "xtask/src/",
        rows: &[
            &["run"],
            &["setup"],
            &["host", "fuzz", "demo", "lab", "lint"],
            &["bench", "test"],
        ],
    },
];

/// Finds imports of a room that does not stand in a lower row.
pub(super) fn check(source: &Source) -> Vec<Finding> {
    let file = source.file.to_string_lossy();
    let Some(house) = HOUSES.iter().find(|it| file.starts_with(it.folder)) else {
        return Vec::new();
    };
    let module = source.module();
    let Some(room) = module.first().cloned() else {
        return Vec::new();
    };
    if source.is_test() || module.iter().any(|it| it == "fuzz" || it == "testing") {
        return Vec::new();
    }
    let mut references = References {
        module,
        found: Vec::new(),
    };
    references.visit_file(&source.syntax);
    let row_of = |room: &str| house.rows.iter().position(|row| row.contains(&room));
    let Some(own) = row_of(&room) else {
        return Vec::new();
    };
    let forbidden = references
        .found
        .into_iter()
        .filter(|(to, _)| *to != room && row_of(to).is_some_and(|row| row >= own));
    forbidden
        .map(|(to, line)| Finding {
            file: source.file.clone(),
            line,
            message: format!("{room} may not import {to}, which stands no lower"),
        })
        .collect()
}

/// Modules that a file references by `crate::` or `super::`: top module and line.
struct References {
    module: Vec<String>,
    found: Vec<(String, usize)>,
}

impl References {
    fn path(&mut self, segments: &[String], line: usize) {
        let mut base = match segments.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("super" | "self") => self.module.clone(),
            _ => return,
        };
        for segment in segments {
            match segment.as_str() {
                "crate" | "self" => {}
                "super" => drop(base.pop()),
                name => base.push(name.to_owned()),
            }
        }
        if let Some(room) = base.into_iter().next() {
            self.found.push((room, line));
        }
    }

    fn tree(&mut self, tree: &syn::UseTree, before: &mut Vec<String>) {
        match tree {
            syn::UseTree::Path(path) => {
                before.push(path.ident.to_string());
                self.tree(&path.tree, before);
                before.pop();
            }
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.tree(tree, before);
                }
            }
            syn::UseTree::Name(name) => self.leaf(&name.ident, before),
            syn::UseTree::Rename(rename) => self.leaf(&rename.ident, before),
            syn::UseTree::Glob(glob) => self.path(before, glob.span().start().line),
        }
    }

    fn leaf(&mut self, name: &syn::Ident, before: &[String]) {
        let mut segments = before.to_vec();
        segments.push(name.to_string());
        self.path(&segments, name.span().start().line);
    }
}

impl<'ast> Visit<'ast> for References {
    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree(&item.tree, &mut Vec::new());
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path
            .segments
            .iter()
            .map(|it| it.ident.to_string())
            .collect();
        self.path(&segments, path.span().start().line);
        visit::visit_path(self, path);
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if item.attrs.iter().any(is_for_tests) {
            return;
        }
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }
}

/// Returns true if an attribute restricts an item to tests: `#[cfg(test)]` or `#[cfg(any(test,
/// fuzzing))]`.
fn is_for_tests(attribute: &syn::Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute.meta.require_list().is_ok_and(|list| {
            let mut tokens = list.tokens.to_string();
            tokens.retain(|it| !it.is_whitespace());
            matches!(tokens.as_str(), "test" | "any(test,fuzzing)")
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lint::parsed;

    fn messages(file: &str, text: &str) -> Vec<String> {
        let findings = check(&parsed(file, text));
        findings.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn import_from_a_higher_room_is_found_in_every_form() {
        for text in [
            "use crate::net::Links;",
            "use crate::{glob::Glob, net::{tls::Tls, Links}};",
            "use super::super::net as links;",
            "fn f() { crate::net::run(); }",
            "fn f(it: &crate::net::Links) {}",
        ] {
            let found = messages("agent/src/proto/link.rs", text);
            assert!(!found.is_empty(), "{text}");
            let first =
                "agent/src/proto/link.rs:1: proto may not import net, which stands no lower";
            assert_eq!(found[0], first, "{text}");
        }
    }

    #[test]
    fn imports_from_below_and_within_are_allowed() {
        for text in [
            "use crate::glob::Glob;",
            "use super::context::Context; use crate::proto::io::Output;",
            "#[cfg(test)] mod tests { use crate::net::Links; }",
            "use std::net::Ipv6Addr;",
        ] {
            assert_eq!(messages("agent/src/proto/link.rs", text), [""; 0], "{text}");
        }
        assert_eq!(
            messages("agent/src/proto/tests/link.rs", "use crate::net::Links;"),
            [""; 0]
        );
        assert_eq!(
            messages("agent/src/cli.rs", "use crate::runtime::run;"),
            [""; 0]
        );
    }

    #[test]
    fn rooms_of_one_row_do_not_know_each_other() {
        let found = messages("agent/src/datapath/mod.rs", "use crate::hypervisor::Nic;");
        assert_eq!(found.len(), 1, "{found:?}");
    }
}
