//! Where maps and links are pinned, so that they outlive the agent.
//!
//! ```text
//! /sys/fs/bpf/roamcast/        pin root, from the config
//!   v8/                        layout version
//!     LISTENERS .. EVENTS      maps
//!     links/
//!       snoop-12               TCX link of the program on the port with that ifindex; without
//!                              TCX there are none
//!       gate-12
//!       leak-2
//!       uplink-2               or uplink_native-2, uplink_generic-2: XDP link
//!       replicate-3
//! ```
//!
//! An agent of the same layout adopts all of it. Pins of another layout version are removed: they
//! hold state that this agent would misread, and programs that would do the work twice.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use common::maps::LAYOUT_VERSION;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::{DatapathError, sys};

/// The pin directories, locked for this process.
pub(super) struct Pins {
    maps: PathBuf,
    links: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    /// Makes the directories under `root`, locks them and removes other layout versions.
    ///
    /// # Errors
    ///
    /// [`DatapathError::NoBpfFs`], [`DatapathError::InUse`], [`DatapathError::PinsOfOthers`],
    /// [`DatapathError::Pin`].
    pub(super) fn open(root: &Path) -> Result<Self, DatapathError> {
        check_file_system(root)?;
        let (maps, links) = directories(root);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&links)
            .map_err(pin_error(&links))?;
        for directory in [root, &maps, &links] {
            check_owner(directory, directory == root)?;
        }
        Self::lock(root)
    }

    /// The same for [`Self::remove_all`]: makes nothing, and takes the pins of whichever user, since a
    /// relay need not be root, as an operator is.
    ///
    /// # Errors
    ///
    /// As for [`Self::open`].
    pub(super) fn open_to_remove(root: &Path) -> Result<Self, DatapathError> {
        check_file_system(root)?;
        let (maps, links) = directories(root);
        for directory in [root, &maps, &links] {
            match fs::symlink_metadata(directory) {
                Ok(found) if found.is_dir() => {}
                // Whoever owns the pins may have chosen what it leads to.
                Ok(_) => return Err(pin_error(directory)(io::ErrorKind::NotADirectory.into())),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(pin_error(directory)(error)),
            }
        }
        Self::lock(root)
    }

    fn lock(root: &Path) -> Result<Self, DatapathError> {
        let (maps, links) = directories(root);
        let directory = File::open(root).map_err(pin_error(root))?;
        let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock)
            .map_err(|_| DatapathError::InUse(root.to_owned()))?;
        for entry in fs::read_dir(root).map_err(pin_error(root))?.flatten() {
            let name = entry.file_name();
            let version = name
                .to_string_lossy()
                .strip_prefix('v')
                .is_some_and(|digits| digits.parse::<u32>().is_ok());
            if version && maps.file_name() != Some(&name) {
                tracing::info!(path = %entry.path().display(), "removing pins of another layout");
                fs::remove_dir_all(entry.path()).map_err(pin_error(&entry.path()))?;
            }
        }
        Ok(Self {
            maps,
            links,
            _lock: lock,
        })
    }

    /// Removes all pins, and what they keep.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub(super) fn remove_all(self) -> Result<(), DatapathError> {
        if self.maps.exists() {
            if self.links.exists() {
                for (link, ..) in self.links()? {
                    remove(&link)?;
                }
            }
            fs::remove_dir_all(&self.maps).map_err(pin_error(&self.maps))?;
        }
        match self.maps.parent() {
            // Somebody else may have put something there.
            Some(root) => match fs::remove_dir(root) {
                Err(error) if error.raw_os_error() != Some(libc::ENOTEMPTY) => {
                    Err(pin_error(root)(error))
                }
                _ => Ok(()),
            },
            None => Ok(()),
        }
    }

    /// Directory of the maps.
    pub(super) fn directory(&self) -> &Path {
        &self.maps
    }

    /// Pin of a map.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps.join(name)
    }

    /// Pin of the link of a program on an interface.
    pub(super) fn link(&self, program: &str, ifindex: u32) -> PathBuf {
        self.links.join(format!("{program}-{ifindex}"))
    }

    /// The links that are pinned: path, program, ifindex.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub(super) fn links(&self) -> Result<Vec<(PathBuf, String, u32)>, DatapathError> {
        let entries = fs::read_dir(&self.links).map_err(pin_error(&self.links))?;
        Ok(entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                let (program, ifindex) = name.rsplit_once('-')?;
                let ifindex = ifindex.parse().ok()?;
                Some((entry.path(), program.to_owned(), ifindex))
            })
            .collect())
    }
}

/// The directories of the maps and of the links.
fn directories(root: &Path) -> (PathBuf, PathBuf) {
    let maps = root.join(format!("v{LAYOUT_VERSION}"));
    let links = maps.join("links");
    (maps, links)
}

fn check_file_system(root: &Path) -> Result<(), DatapathError> {
    let existing = root.ancestors().find(|path| path.exists());
    let on_bpffs = existing
        .and_then(|path| statfs(path).ok())
        .is_some_and(|stat| stat.filesystem_type() == BPF_FS_MAGIC);
    if on_bpffs {
        Ok(())
    } else {
        Err(DatapathError::NoBpfFs(root.to_owned()))
    }
}

/// Takes the program of a pinned link off its hook at once, and removes the pin; one that is not
/// there is fine.
///
/// # Errors
///
/// [`DatapathError::Pin`].
pub(super) fn remove(path: &Path) -> Result<(), DatapathError> {
    if path.exists()
        && let Err(error) = sys::detach_link(path)
    {
        // Of an interface that is gone, for instance. The link goes with its pin anyway.
        tracing::debug!(path = %path.display(), %error, "link not detached before its pin");
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(pin_error(path)(error)),
        _ => Ok(()),
    }
}

/// Whether nobody but this user can have put pins into a directory: whoever can chooses the maps that the
/// programs read. Where `may_be_shared`, others may have files of their own beside this user's.
fn check_owner(directory: &Path, may_be_shared: bool) -> Result<(), DatapathError> {
    let found = fs::symlink_metadata(directory).map_err(pin_error(directory))?;
    let mode = found.mode() & 0o7777;
    // As a BPF file system is mounted by default.
    let is_sticky = may_be_shared && mode & 0o1000 != 0;
    let is_own = found.uid() == nix::unistd::geteuid().as_raw();
    if found.is_dir() && is_own && (mode & 0o022 == 0 || is_sticky) {
        return Ok(());
    }
    Err(DatapathError::PinsOfOthers {
        path: directory.to_owned(),
        owner: found.uid(),
        mode,
    })
}

fn pin_error(path: &Path) -> impl FnOnce(io::Error) -> DatapathError + use<> {
    let path = path.to_owned();
    move |error| DatapathError::Pin { path, error }
}
