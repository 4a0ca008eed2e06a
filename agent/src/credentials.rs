//! Files that systemd has read for this process (`LoadCredential=`), which has no right to read them
//! itself. Others cannot read them, whatever their mode seems to say: the directory is not theirs.

use std::env;
use std::path::{Path, PathBuf};

/// Where systemd says that the directory is.
const DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// The file that systemd has read under this name; else the other one.
pub fn find_or(name: &str, other: &str) -> PathBuf {
    directory()
        .and_then(|directory| find(&directory, name))
        .unwrap_or_else(|| PathBuf::from(other))
}

/// Whether a file is one that systemd has read for this process.
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
