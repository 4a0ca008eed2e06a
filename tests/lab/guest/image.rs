//! Builds kernel and initramfs of the lab's guests.
//!
//! The initramfs contains `/init` (the program `guest`), `migkick`, busybox and the kernel modules
//! that the guest needs. The initramfs is not compressed: without KVM, decompression takes longer
//! than reading.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    cpio::{self, Archive},
    wire::frame::crc32,
};
use crate::{kernel, machine};

/// Modules to load at boot, unless the kernel has them built in.
///
/// `dummy` carries the home address of `migkick node`.
const MODULES: &[&str] = &["virtio_pci", "virtio_console", "virtio_net", "dummy"];

/// Modules that are in the initramfs, and that only some tests load.
const EXTRA_MODULES: &[&str] = &["cls_bpf", "sch_ingress", "sch_netem", "sch_plug"];

/// Kernel command line of the guests. An emulated CPU leaks nothing, so the guest needs no
/// mitigations.
pub const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off \
                                tsc=reliable no_timer_check preempt=full";

/// Path of the list of modules in the initramfs.
pub const MODULE_LIST: &str = "/lib/modules/load";

/// File name of the initramfs.
const INITRD: &str = "initrd";

/// Files from which a guest boots.
#[derive(Clone, Debug)]
pub struct Image {
    /// Path of the kernel.
    pub kernel: PathBuf,
    /// Path of the initramfs.
    pub initrd: PathBuf,
}

/// Returns the default directory of the cache: `target/guest` of the workspace.
pub fn default_directory() -> PathBuf {
    workspace().join("target/guest")
}

/// Builds kernel and initramfs in `directory`, or only checks that they are up to date.
///
/// # Errors
///
/// When cargo cannot build the guest's programs, when busybox is not installed or not static, or
/// when no kernel package is available. The text names the step.
pub fn ensure(directory: &Path) -> Result<Image> {
    if machine::inside() {
        return prebuilt(directory);
    }
    fs::create_dir_all(directory)
        .with_context(|| format!("Cannot create {}", directory.display()))?;
    let directory = directory.canonicalize()?;
    // Tests of several processes may build at the same time.
    let lock = File::create(directory.join("lock"))?;
    lock.lock()?;

    let kernel = kernel::newest_cloud(&directory)?;
    let programs = build_programs(&directory)?;
    let busybox = busybox()?;

    let inputs = [
        ("/init", fs::read(programs.join("guest"))?),
        ("/bin/migkick", fs::read(programs.join("migkick"))?),
        ("/bin/busybox", fs::read(&busybox)?),
    ];
    let mut fingerprint = kernel.release.clone();
    for (path, contents) in &inputs {
        fingerprint += &format!(" {path}:{}:{:08x}", contents.len(), crc32(&[contents]));
    }
    for name in MODULES.iter().chain(EXTRA_MODULES) {
        fingerprint += &format!(" {name}");
    }
    let initrd = directory.join(INITRD);
    cpio::ensure(&initrd, &fingerprint, || {
        archive(&inputs, &kernel, &busybox)
    })?;
    Ok(Image {
        kernel: kernel.image,
        initrd,
    })
}

/// Returns the image that was built outside, because the host machine cannot build one.
fn prebuilt(directory: &Path) -> Result<Image> {
    let kernel = kernel::newest_cloud(directory)?.image;
    let initrd = directory.join(INITRD);
    ensure!(
        initrd.exists(),
        "There is no guest image at {}: run `cargo xtask setup` outside the host machine",
        initrd.display()
    );
    Ok(Image { kernel, initrd })
}

fn archive(inputs: &[(&str, Vec<u8>)], kernel: &kernel::Kernel, busybox: &Path) -> Result<Archive> {
    let mut archive = Archive::default();
    for directory in [
        "/bin",
        "/dev",
        "/etc",
        "/lib",
        "/lib/modules",
        "/proc",
        "/run",
        "/sys",
        "/tmp",
        "/root",
    ] {
        archive.directory(directory);
    }
    archive.device("/dev/console", 5, 1);
    for (path, contents) in inputs {
        archive.file(path, contents);
    }
    let applets = Command::new(busybox)
        .arg("--list")
        .output()
        .context("Cannot run busybox")?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines() {
        if applet != "busybox" {
            archive.symlink(&format!("/bin/{applet}"), "busybox");
        }
    }
    let boot = kernel.modules(MODULES)?;
    let list: String = boot
        .iter()
        .map(|module| format!("{}\n", module.file_name))
        .collect();
    archive.file(MODULE_LIST, list.as_bytes());
    for module in boot.iter().chain(&kernel.modules(EXTRA_MODULES)?) {
        archive.file(
            &format!("/lib/modules/{}", module.file_name),
            &module.contents,
        );
    }
    Ok(archive)
}

/// Builds `guest` and `migkick` as static programs, because the initramfs has no libraries.
///
/// The programs have a target directory of their own, because their flags would make cargo rebuild
/// the main target directory each time.
fn build_programs(directory: &Path) -> Result<PathBuf> {
    let target = "x86_64-unknown-linux-gnu";
    let target_directory = directory.join("build");
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(workspace())
        .args([
            "build",
            "--quiet",
            "--release",
            "--locked",
            "--target",
            target,
        ])
        .args(["--package", "roamcast-lab", "--bin", "guest"])
        .args(["--package", "migkick", "--bin", "migkick"])
        .arg("--target-dir")
        .arg(&target_directory)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env(
            "RUSTFLAGS",
            "-C target-feature=+crt-static -C strip=symbols",
        )
        .output()
        .context("Cannot run cargo to build the guest's programs")?;
    ensure!(
        output.status.success(),
        "Cannot build the guest's programs: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(target_directory.join(target).join("release"))
}

/// Returns the path of a static busybox.
pub(crate) fn busybox() -> Result<PathBuf> {
    let path = ["/bin/busybox", "/usr/bin/busybox"]
        .into_iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .context("There is no busybox; install the package busybox-static")?;
    let contents = fs::read(&path)?;
    let interpreter = b"/lib64/ld-linux";
    let is_dynamic = contents
        .windows(interpreter.len())
        .take(4096)
        .any(|it| it == interpreter);
    ensure!(
        !is_dynamic,
        "{} is not static; install the package busybox-static",
        path.display()
    );
    Ok(path)
}

fn workspace() -> &'static Path {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    package.parent().unwrap_or(package)
}
