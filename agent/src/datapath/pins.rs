//! Pins of the maps and links, which outlive the agent.
//!
//! ```text
//! /sys/fs/bpf/roamcast/        pin root, from the config
//!   v9/                        layout version
//!     BRIDGES .. EVENTS        maps
//!     links/
//!       snoop-12               TCX link of the program on the port with that ifindex; without
//!                              TCX there are none
//!       gate-12
//!       leak-2
//!       uplink-2               or uplink_native-2, uplink_generic-2: XDP link
//!       replicate-3
//! ```
//!
//! An agent with the same layout version adopts everything. Pins of another layout version are
//! removed: this agent would misread their state, and their programs would process each packet a
//! second time.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use common::maps::LAYOUT_VERSION;
use linux::bpf::pins::{self, LinkPin, Lock, PinError};

use super::DatapathError;

/// The pin directories, locked by this process.
pub(super) struct Pins {
    maps: PathBuf,
    links: PathBuf,
    _lock: Lock,
}

impl Pins {
    /// Creates the directories under `root`, locks them, and removes other layout versions.
    ///
    /// # Errors
    ///
    /// [`DatapathError::NoBpfFs`], [`DatapathError::InUse`], [`DatapathError::PinsOfOthers`],
    /// [`DatapathError::Pin`].
    pub(super) fn open(root: &Path) -> Result<Self, DatapathError> {
        check_file_system(root)?;
        let (maps, links) = directories(root);
        pins::create_directory(&links)?;
        for directory in [root, &maps, &links] {
            pins::check_owner(directory, directory == root)?;
        }
        Self::lock(root)
    }

    /// Locks existing directories for [`Self::remove_all`]. Creates nothing, and accepts pins of
    /// any user, because a relay may run as another user than the operator, who is root.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub(super) fn open_to_remove(root: &Path) -> Result<Self, DatapathError> {
        check_file_system(root)?;
        let (maps, links) = directories(root);
        for directory in [root, &maps, &links] {
            match fs::symlink_metadata(directory) {
                Ok(found) if found.is_dir() => {}
                // A symbolic link is refused: the owner of the pins may have chosen its target.
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

    /// Removes all pins, and thereby the maps and links that only the pins keep.
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
            // Another program may have put files there.
            Some(root) => match fs::remove_dir(root) {
                Err(error) if error.raw_os_error() != Some(libc::ENOTEMPTY) => {
                    Err(pin_error(root)(error))
                }
                _ => Ok(()),
            },
            None => Ok(()),
        }
    }

    /// Directory of the pinned maps.
    pub(super) fn directory(&self) -> &Path {
        &self.maps
    }

    /// Path of a map's pin.
    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps.join(name)
    }

    /// Path of the link's pin for a program on an interface.
    pub(super) fn link(&self, program: &str, ifindex: u32) -> PathBuf {
        pins::link(&self.links, program, ifindex)
    }

    /// Returns the pinned links.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub(super) fn links(&self) -> Result<Vec<LinkPin>, DatapathError> {
        Ok(pins::links(&self.links)?)
    }
}

/// Returns the directories of the maps and of the links.
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

fn pin_error(path: &Path) -> impl FnOnce(io::Error) -> DatapathError + use<> {
    let error = PinError::of(path);
    move |cause| error(cause).into()
}
