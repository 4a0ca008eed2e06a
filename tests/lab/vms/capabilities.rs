//! Keeps libvirt's cache of QEMU's capabilities from one lab to the next.
//!
//! A libvirtd without this cache starts every QEMU binary once to learn its capabilities. This
//! takes about 2.5 s, in the middle of the first migration. libvirt itself checks that a cached
//! file belongs to the installed QEMU, libvirt and kernel.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::Vms;

/// Directory of the kept files, common to all labs.
const KEPT: &str = "/var/cache/roamcast/qemu-capabilities";

/// Copies the kept files to a VMS before its start.
pub(crate) fn restore(directory: &Path) -> Result<()> {
    copy(Path::new(KEPT), &cache(directory))
}

/// Makes the libvirtd of both hosts read QEMU's capabilities, and keeps the files.
pub(crate) fn prime(hosts: &[Vms; 2]) -> Result<()> {
    let [first, second] = hosts;
    first.output(first.virsh().arg("capabilities"))?;
    copy(&cache(first.directory()), &cache(second.directory()))?;
    second.output(second.virsh().arg("capabilities"))?;
    copy(&cache(first.directory()), Path::new(KEPT))
}

fn cache(directory: &Path) -> PathBuf {
    directory.join("cache/qemu/capabilities")
}

/// Copies the files that differ. Renames each file into place, because other labs may be reading.
fn copy(source: &Path, target: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(source) else {
        return Ok(());
    };
    fs::create_dir_all(target).with_context(|| format!("Failed to create {}", target.display()))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let Some(name) = path
            .file_name()
            .filter(|_| path.extension() == Some("xml".as_ref()))
        else {
            continue;
        };
        let copy = target.join(name);
        let content =
            fs::read(&path).with_context(|| format!("Failed to read {}", path.display()))?;
        if fs::read(&copy).is_ok_and(|old| old == content) {
            continue;
        }
        let temporary = target.join(format!("{}.{}", name.display(), std::process::id()));
        fs::write(&temporary, content)
            .and_then(|()| fs::rename(&temporary, &copy))
            .with_context(|| format!("Failed to write {}", copy.display()))?;
    }
    Ok(())
}
