//! Directories with pins on a BPF file system (bpffs).
//!
//! ```text
//! ROOT/          locked by the process that has the pins
//!   v9/          one layout: maps, and links named PROGRAM-IFINDEX
//! ```
//!
//! Pins of another layout are removed: this process would misread their state, and their programs
//! would process each packet a second time.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::sys;

/// Why the pins cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// Another process holds the lock.
    #[error("Another process uses the pins under {}", .0.display())]
    InUse(PathBuf),
    /// Another user can add or replace pins in the directory.
    #[error("Others can change what is in {} (owner {owner}, mode {mode:o})", path.display())]
    OfOthers {
        /// Directory with the wrong owner or mode.
        path: PathBuf,
        /// User ID of its owner.
        owner: u32,
        /// Permission bits of the directory, as in `chmod`.
        mode: u32,
    },
    /// A pin cannot be created, read or removed.
    #[error("Cannot use the pin {}: {error}", path.display())]
    Pin {
        /// Path of the pin.
        path: PathBuf,
        /// Error of the system call.
        #[source]
        error: io::Error,
    },
}

impl PinError {
    /// Returns a conversion of errors that names this pin.
    pub fn of(path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |error| Self::Pin { path, error }
    }
}

/// Whether a path is on a BPF file system, or would be if it existed.
pub fn is_on_bpf_fs(path: &Path) -> bool {
    let existing = path.ancestors().find(|path| path.exists());
    existing
        .and_then(|path| statfs(path).ok())
        .is_some_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC)
}

/// Returns the directory of a layout under a root.
pub fn directory_of(root: &Path, layout: u32) -> PathBuf {
    root.join(format!("v{layout}"))
}

/// Creates a directory, and those above it, for this user only. An existing directory stays as it is.
///
/// # Errors
///
/// [`PinError::Pin`].
pub fn create_directory(directory: &Path) -> Result<(), PinError> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(directory).map_err(PinError::of(directory))
}

/// Fails unless only this user can create pins in a directory: a pin decides which map the programs
/// read. With `may_be_shared`, other users may have files of their own in a sticky directory.
///
/// # Errors
///
/// [`PinError::OfOthers`] or [`PinError::Pin`].
pub fn check_owner(directory: &Path, may_be_shared: bool) -> Result<(), PinError> {
    let found = fs::symlink_metadata(directory).map_err(PinError::of(directory))?;
    let mode = found.mode() & 0o7777;
    // Default mode of a BPF file system mount.
    let is_sticky = may_be_shared && mode & 0o1000 != 0;
    let is_own = found.uid() == nix::unistd::geteuid().as_raw();
    if found.is_dir() && is_own && (mode & 0o022 == 0 || is_sticky) {
        return Ok(());
    }
    Err(PinError::OfOthers {
        path: directory.to_owned(),
        owner: found.uid(),
        mode,
    })
}

/// Lock on the pins under a root, held until the value is dropped.
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "held for its drop")] Flock<File>);

impl Lock {
    /// Locks an existing root, and removes the pins of other layouts.
    ///
    /// # Errors
    ///
    /// [`PinError::InUse`] or [`PinError::Pin`].
    pub fn take(root: &Path, layout: u32) -> Result<Self, PinError> {
        let directory = File::open(root).map_err(PinError::of(root))?;
        let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock)
            .map_err(|_| PinError::InUse(root.to_owned()))?;
        let own = directory_of(root, layout);
        for entry in fs::read_dir(root).map_err(PinError::of(root))?.flatten() {
            let path = entry.path();
            if is_layout(&entry.file_name().to_string_lossy()) && path != own {
                tracing::info!(path = %path.display(), "removing pins of another layout");
                fs::remove_dir_all(&path).map_err(PinError::of(&path))?;
            }
        }
        Ok(Self(lock))
    }
}

fn is_layout(name: &str) -> bool {
    name.strip_prefix('v')
        .is_some_and(|digits| digits.parse::<u32>().is_ok())
}

/// A pinned link, found by its file name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkPin {
    /// Path of the pin.
    pub path: PathBuf,
    /// Name of the program, from the name of the pin.
    pub program: String,
    /// Interface index, from the name of the pin.
    pub ifindex: u32,
}

/// Returns the path of the pin for a program's link on an interface.
pub fn link(directory: &Path, program: &str, ifindex: u32) -> PathBuf {
    directory.join(format!("{program}-{ifindex}"))
}

/// Returns the pinned links in a directory.
///
/// # Errors
///
/// [`PinError::Pin`].
pub fn links(directory: &Path) -> Result<Vec<LinkPin>, PinError> {
    let entries = fs::read_dir(directory).map_err(PinError::of(directory))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let (program, ifindex) = name.rsplit_once('-')?;
            Some(LinkPin {
                path: entry.path(),
                program: program.to_owned(),
                ifindex: ifindex.parse().ok()?,
            })
        })
        .collect())
}

/// Detaches the program of a pinned link at once, and removes the pin. A missing pin is no error.
///
/// # Errors
///
/// [`PinError::Pin`].
pub fn remove_link(path: &Path) -> Result<(), PinError> {
    if path.exists()
        && let Err(error) = sys::detach_link(path)
    {
        // Fails for instance on a deleted interface. The link ends with its pin in any case.
        tracing::debug!(path = %path.display(), %error, "link not detached before its pin");
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(PinError::of(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_directories_of_layouts_are_removed() {
        assert!(["v1", "v10"].into_iter().all(is_layout));
        assert!(!["v", "v1x", "links", "1"].into_iter().any(is_layout));
    }

    #[test]
    fn directory_in_which_others_can_create_pins_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("pins").join("v1");
        create_directory(&directory).unwrap();
        check_owner(&directory, false).unwrap();
        let set_mode = |mode| {
            fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
        };
        for mode in [0o770, 0o707, 0o777] {
            set_mode(mode);
            let refused = check_owner(&directory, true);
            let Err(PinError::OfOthers { mode: found, .. }) = refused else {
                panic!("{mode:o}: {refused:?}");
            };
            assert_eq!(found, mode);
        }
        set_mode(0o1777);
        check_owner(&directory, true).unwrap();
        assert!(check_owner(&directory, false).is_err());
    }

    #[test]
    fn link_to_a_directory_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("v1");
        create_directory(&directory).unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        assert!(matches!(
            check_owner(&link, false),
            Err(PinError::OfOthers { .. })
        ));
    }
}
