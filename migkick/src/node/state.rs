//! State of a node that survives restarts.

use std::fs;
use std::io;
use std::path::Path;

use super::core::Saved;

/// Reads the state of the last run. A missing or malformed file counts as the first start; the
/// servers correct the sequence number.
pub(super) fn load(path: &Path) -> Saved {
    fs::read(path)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

/// Saves the state atomically.
pub(super) fn save(path: &Path, saved: Saved) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(&saved)?)?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_read_and_garbage_is_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state/node.json");
        assert_eq!(load(&path), Saved::default());
        let saved = Saved {
            sequence: 7,
            moa: Some("2001:db8::1".parse().unwrap()),
        };
        save(&path, saved).unwrap();
        assert_eq!(load(&path), saved);
        fs::write(&path, "{\"sequence\": -1}").unwrap();
        assert_eq!(load(&path), Saved::default());
    }
}
