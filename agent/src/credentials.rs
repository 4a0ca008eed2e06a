//! Files that systemd has read for this process (`LoadCredential=`), because the process may not
//! read the originals. The mode may show access for others, but others cannot enter the directory.

use std::env;
use std::path::{Path, PathBuf};

/// Environment variable in which systemd names the directory.
const DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// Returns the path of systemd's copy with this name, or `other` if there is no copy.
pub fn find_or(name: &str, other: &str) -> PathBuf {
    directory()
        .and_then(|directory| find(&directory, name))
        .unwrap_or_else(|| PathBuf::from(other))
}

/// Returns true if a file is one of systemd's copies.
pub fn has(path: &Path) -> bool {
    directory().is_some_and(|directory| path.parent() == Some(&directory))
}

fn directory() -> Option<PathBuf> {
    env::var_os(DIRECTORY).map(PathBuf::from)
}

fn find(directory: &Path, name: &str) -> Option<PathBuf> {
    let path = directory.join(name);
    path.exists().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_read_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("key.pem"), "key").unwrap();
        let found = find(directory.path(), "key.pem");
        assert_eq!(found, Some(directory.path().join("key.pem")));
        assert_eq!(find(directory.path(), "cert.pem"), None);
        assert_eq!(find_or("no-such-credential", "/etc/x"), Path::new("/etc/x"));
    }
}
