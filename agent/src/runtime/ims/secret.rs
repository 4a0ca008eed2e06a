//! The secret of the mapping servers: a file with 32 random bytes in hexadecimal, readable only by
//! root.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use common::mat::key::{KEY_BYTES, Secret};
use linux::random;

use crate::credentials;

/// Why the secret is unusable.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The file does not exist.
    #[error("There is no secret in {}; make it with `roamcast ims init`, or copy that of another server of this home prefix", path.display())]
    Missing {
        /// Path of the file.
        path: PathBuf,
    },
    /// The file exists already.
    #[error("{} holds a secret already; without it no node is known any more, so it is not replaced", path.display())]
    Exists {
        /// Path of the file.
        path: PathBuf,
    },
    /// Other users can read the file.
    #[error("{} can be read by others (mode {mode:o}); set it to 600, and make a new one if they may have read it", path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        /// Permission bits of the file.
        mode: u32,
    },
    /// The file does not contain a secret.
    #[error("{} holds no secret: 64 hexadecimal digits", path.display())]
    Malformed {
        /// Path of the file.
        path: PathBuf,
    },
    /// Reading or writing the file failed.
    #[error("Cannot use the secret {}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
}

/// Makes a secret and writes its file.
///
/// # Errors
///
/// [`SecretError::Exists`], [`SecretError::Io`].
pub fn init(path: &Path) -> Result<(), SecretError> {
    let failed = |source| SecretError::Io {
        path: path.to_owned(),
        source,
    };
    let bytes: [u8; KEY_BYTES] = random::bytes().map_err(failed)?;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(failed)?;
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => SecretError::Exists {
                path: path.to_owned(),
            },
            _ => failed(error),
        })?;
    file.write_all(format!("{}\n", hex(&bytes)).as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(failed)
}

/// Reads the secret from its file.
///
/// # Errors
///
/// [`SecretError`].
pub fn load(path: &Path) -> Result<Secret, SecretError> {
    let path = path.to_owned();
    let read = std::fs::metadata(&path)
        .and_then(|metadata| Ok((metadata.mode() & 0o777, std::fs::read_to_string(&path)?)));
    let (mode, text) = match read {
        Ok(read) => read,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(SecretError::Missing { path });
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(SecretError::Malformed { path });
        }
        Err(source) => return Err(SecretError::Io { path, source }),
    };
    // systemd grants access to a credential by an access control list; the mode then shows the
    // list's mask.
    if mode & 0o077 != 0 && !credentials::has(&path) {
        return Err(SecretError::Open { path, mode });
    }
    let bytes = parse(text.trim()).ok_or(SecretError::Malformed { path })?;
    Ok(Secret::new(&bytes))
}

/// Returns bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn parse(text: &str) -> Option<[u8; KEY_BYTES]> {
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else {
        return None;
    };
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let bytes: Option<Vec<u8>> = pairs
        .iter()
        .map(|[high, low]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok())
        .collect();
    bytes?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn secret_is_made_once_and_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("etc/ims.secret");
        assert!(matches!(load(&path), Err(SecretError::Missing { .. })));
        init(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let key = load(&path).unwrap().node([1; 16], 1);
        assert_eq!(load(&path).unwrap().node([1; 16], 1), key);
        assert!(matches!(init(&path), Err(SecretError::Exists { .. })));
        assert_eq!(load(&path).unwrap().node([1; 16], 1), key);
    }

    #[test]
    fn secret_that_others_can_read_or_that_is_none_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ims.secret");
        init(&path).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let error = load(&path).unwrap_err();
        assert!(error.to_string().contains("mode 640"), "{error}");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        for text in ["", "12", &"0".repeat(63), &"x".repeat(64), &"0".repeat(66)] {
            std::fs::write(&path, text).unwrap();
            let error = load(&path).unwrap_err();
            assert!(matches!(error, SecretError::Malformed { .. }), "{text}");
        }
    }
}
