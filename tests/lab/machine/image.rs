//! Kernel and initramfs of the host machine.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::guest::cpio::{self, Archive};
use crate::guest::image::{busybox, default_directory};
use crate::guest::wire::frame::crc32;
use crate::kernel::{self, Kernel};

/// Script of the initramfs's first process.
const INIT: &str = include_str!("init.sh");

/// Modules that `init.sh` needs before it has the outer file system.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_rng",
    "9pnet_virtio",
    "9p",
    "overlay",
];

/// Files from which a machine boots.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) kernel: Kernel,
    pub(super) initrd: PathBuf,
}

/// Unpacks the kernel of `choice` and builds its initramfs, or only checks that both are there.
pub(super) fn ensure(choice: &str) -> Result<Image> {
    let directory = default_directory().join("machine");
    fs::create_dir_all(&directory)
        .with_context(|| format!("Cannot create {}", directory.display()))?;
    // Two processes may start machines at the same time.
    let lock = File::create(directory.join("lock"))?;
    lock.lock()?;

    let kernel = kernel::chosen(&directory, choice)?;
    let busybox = fs::read(busybox()?)?;
    let fingerprint = format!(
        "{} busybox:{:08x} init:{:08x} {}",
        kernel.release,
        crc32(&[&busybox]),
        crc32(&[INIT.as_bytes()]),
        MODULES.join(" ")
    );
    let initrd = directory.join(format!("{}.initrd", kernel.release));
    cpio::ensure(&initrd, &fingerprint, || archive(&kernel, &busybox))?;
    Ok(Image { kernel, initrd })
}

fn archive(kernel: &Kernel, busybox: &[u8]) -> Result<Archive> {
    let mut archive = Archive::default();
    for directory in [
        "/bin", "/dev", "/lib", "/outer", "/over", "/proc", "/root", "/sys",
    ] {
        archive.directory(directory);
    }
    archive.device("/dev/console", 5, 1);
    archive.file("/init", INIT.as_bytes());
    archive.file("/bin/busybox", busybox);
    let modules = kernel.modules(MODULES)?;
    let list: String = modules
        .iter()
        .map(|module| format!("{}\n", module.file_name))
        .collect();
    archive.file("/modules", list.as_bytes());
    for module in &modules {
        archive.file(&format!("/lib/{}", module.file_name), &module.contents);
    }
    Ok(archive)
}

/// Returns the path of the program to which `init.sh` hands over.
///
/// The kernel's command line carries the path, and cannot carry a blank.
pub(super) fn next_program() -> Result<PathBuf> {
    let path = crate::binaries::path("machine-init")?;
    anyhow::ensure!(
        is_one_word(&path),
        "The path {} has a blank or is not UTF-8: move this workspace elsewhere",
        path.display()
    );
    Ok(path)
}

fn is_one_word(path: &Path) -> bool {
    path.to_str()
        .is_some_and(|path| !path.contains(char::is_whitespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_with_blanks_do_not_fit_on_the_kernels_command_line() {
        assert!(is_one_word(Path::new("/srv/target/debug/machine-init")));
        assert!(!is_one_word(Path::new("/srv/my files/machine-init")));
    }
}
