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

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use common::maps::LAYOUT_VERSION;
use linux::bpf::pins::{self, LinkPin, Lock, PinError};

use super::DatapathError;

/// The pin directories, locked for this process.
pub(super) struct Pins {
    maps: PathBuf,
    links: PathBuf,
    _lock: Lock,
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
        let lock = Lock::take(root, LAYOUT_VERSION)?;
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
                for link in self.links()? {
                    pins::remove_link(&link.path)?;
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
        pins::link(&self.links, program, ifindex)
    }

    /// The links that are pinned.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub(super) fn links(&self) -> Result<Vec<LinkPin>, DatapathError> {
        Ok(pins::links(&self.links)?)
    }
}

/// The directories of the maps and of the links.
fn directories(root: &Path) -> (PathBuf, PathBuf) {
    let maps = pins::directory_of(root, LAYOUT_VERSION);
    let links = maps.join("links");
    (maps, links)
}

fn check_file_system(root: &Path) -> Result<(), DatapathError> {
    if pins::is_on_bpf_fs(root) {
        Ok(())
    } else {
        Err(DatapathError::NoBpfFs(root.to_owned()))
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
    let error = PinError::of(path);
    move |cause| error(cause).into()
}
