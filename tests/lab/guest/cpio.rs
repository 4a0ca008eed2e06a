//! Writes cpio archives in the "newc" format, which the kernel reads as an initramfs.
//!
//! See the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`. The owner is root
//! and all times are zero, so equal inputs give equal archives.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Writes the archive that `make` returns to `path`, unless `path` already has an archive of the
/// same `fingerprint`.
pub(crate) fn ensure(
    path: &Path,
    fingerprint: &str,
    make: impl FnOnce() -> Result<Archive>,
) -> Result<()> {
    let stamp = path.with_added_extension("inputs");
    if path.exists() && fs::read_to_string(&stamp).is_ok_and(|stamp| stamp == fingerprint) {
        return Ok(());
    }
    let directory = path.parent().context("An archive needs a directory")?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(&make()?.finish())?;
    // The old stamp is removed first, so that an interruption cannot leave the old stamp beside a
    // new archive.
    let _ = fs::remove_file(&stamp);
    file.persist(path)?;
    fs::write(&stamp, fingerprint)?;
    Ok(())
}

/// An archive under construction.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// Adds a directory. Its parent must already be in the archive.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, (0, 0), &[]);
    }

    /// Adds an executable file.
    pub(crate) fn file(&mut self, path: &str, contents: &[u8]) {
        self.entry(path, EXECUTABLE, (0, 0), contents);
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, SYMLINK, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.entry(path, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// Returns the finished archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), contents: &[u8]) {
        self.inode += 1;
        let name = path.trim_start_matches('/');
        let (links, size, name_size) = (1, contents.len(), name.len() + 1);
        let (inode, (major, minor)) = (self.inode, device);
        // Owner, group, modification time, and the device that holds the file are zero.
        self.bytes.extend(
            format!(
                "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}{size:08x}{0:08x}\
                 {0:08x}{major:08x}{minor:08x}{name_size:08x}{0:08x}",
                0
            )
            .bytes(),
        );
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn archive_is_read_by_another_cpio() {
        let mut archive = Archive::default();
        archive.directory("/bin");
        archive.file("/bin/tool", b"12345");
        archive.symlink("/bin/sh", "tool");
        let child = std::process::Command::new("busybox")
            .args(["cpio", "-t"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut child) = child else {
            assert!(std::env::var_os("CI").is_none(), "busybox is missing");
            println!("skipped: busybox is not installed");
            return;
        };
        child
            .stdin
            .take()
            .unwrap()
            .write_all(&archive.finish())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "bin\nbin/tool\nbin/sh\n"
        );
    }
}
