//! Parses the source files of the tree.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Folders of the crates that the checks read.
const FOLDERS: [&str; 6] = ["agent", "agent-ebpf", "common", "migkick", "tests", "xtask"];

/// A parsed file.
pub(super) struct Source {
    /// Path from the root of the tree.
    pub(super) file: PathBuf,
    pub(super) text: String,
    pub(super) syntax: syn::File,
}

impl Source {
    /// Parses `text`, the content of `file`.
    ///
    /// # Errors
    ///
    /// The text is not Rust.
    pub(super) fn parse(file: PathBuf, text: String) -> Result<Self> {
        let syntax =
            syn::parse_file(&text).with_context(|| format!("Cannot parse {}", file.display()))?;
        Ok(Self { file, text, syntax })
    }

    /// Returns true if the file contains only tests.
    pub(super) fn is_test(&self) -> bool {
        self.file.with_extension("").iter().any(|it| it == "tests")
    }

    /// Returns the path of the file's module within its crate: `agent/src/net/tls.rs` is `["net",
    /// "tls"]`.
    pub(super) fn module(&self) -> Vec<String> {
        let inner = self.file.iter().skip_while(|it| *it != "src").skip(1);
        let mut module: Vec<String> = inner
            .map(|it| it.to_string_lossy().trim_end_matches(".rs").to_owned())
            .collect();
        if module
            .last()
            .is_some_and(|it| matches!(it.as_str(), "mod" | "lib" | "main"))
        {
            module.pop();
        }
        module
    }
}

/// Reads every Rust file of the crates under `root`.
///
/// # Errors
///
/// A file cannot be read or parsed.
pub(super) fn all(root: &Path) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    let mut folders: Vec<PathBuf> = FOLDERS.iter().map(|it| root.join(it)).collect();
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("Cannot list {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            if entry.file_type()?.is_dir() {
                if path.file_name().is_none_or(|it| it != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|it| it == "rs") {
                let text = fs::read_to_string(&path)
                    .with_context(|| format!("Cannot read {}", path.display()))?;
                let file = path.strip_prefix(root).unwrap_or(&path).to_owned();
                sources.push(Source::parse(file, text)?);
            }
        }
    }
    Ok(sources)
}

#[cfg(test)]
mod tests {
    use super::super::parsed;

    #[test]
    fn module_of_a_file_is_its_path_in_the_crate() {
        let module = |file| parsed(file, "").module().join("::");
        assert_eq!(module("agent/src/net/tls.rs"), "net::tls");
        assert_eq!(module("agent/src/net/mod.rs"), "net");
        assert_eq!(module("agent/src/lib.rs"), "");
        assert_eq!(module("common/linux/src/netlink.rs"), "netlink");
    }
}
