//! Directories with pins on a BPF file system (bpffs).
//!
//! ```text
//! ROOT/          locked by the process that has the pins
//!   v8/          one layout: maps, and links named PROGRAM-IFINDEX
//! ```
//!
//! Pins of another layout are removed: this process would misread their state, and their programs
//! would process each packet a second time.

use std::fs::{self, File};
use std::io;
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
    use super::*;

    #[test]
    fn only_directories_of_layouts_are_removed() {
        assert!(["v1", "v10"].into_iter().all(is_layout));
        assert!(!["v", "v1x", "links", "1"].into_iter().any(is_layout));
    }
}
