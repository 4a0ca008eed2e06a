//! Reader of libvirt's own configuration files: lines of `key = value`.

use std::path::{Path, PathBuf};

/// Returns the values of a key without quotes, one for each line that sets the key.
pub(super) fn values<'a>(settings: &'a str, key: &'a str) -> impl Iterator<Item = &'a str> {
    settings.lines().filter_map(move |line| {
        let (name, value) = line.split_once('=')?;
        (name.trim() == key).then(|| value.trim().trim_matches('"'))
    })
}

/// Returns an absolute path as a path below `root`.
pub(super) fn below(root: &Path, path: &str) -> PathBuf {
    root.join(path.trim_start_matches('/'))
}
