//! libvirt's own configuration files: `key = value`, each on a line of its own.

use std::path::{Path, PathBuf};

/// What a key is set to, without quotes; one value for each line that sets it.
pub(super) fn values<'a>(settings: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    settings.lines().filter_map(move |line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == key).then(|| value.trim().trim_matches('"'))
    })
}

/// An absolute path, below `root`.
pub(super) fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}
