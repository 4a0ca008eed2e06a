//! Checks from files whether QEMU can encrypt the copy of a VM's memory here (`VIR_MIGRATE_TLS`).
//!
//! libvirt gives QEMU one directory with certificates (`tls-creds-x509`), the first of:
//!
//! 1. `migrate_tls_x509_cert_dir` in `qemu.conf`
//! 2. `/etc/pki/libvirt-migrate`, if the directory exists
//! 3. `default_tls_x509_cert_dir` in `qemu.conf`
//! 4. `/etc/pki/qemu`
//!
//! QEMU reads the keys as the user that runs VMs.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::settings::{below, values};
use crate::proto::{CopyTls, NoCopyTls};

const SETTINGS: &str = "etc/libvirt/qemu.conf";
const OF_MIGRATION: &str = "/etc/pki/libvirt-migrate";
const OF_ALL: &str = "/etc/pki/qemu";
/// Values of `user` in `qemu.conf` that stand for root, who can read every file.
const ROOT: [&str; 4] = ["root", "+0", "0", "root:root"];

/// Checks the files below `root`.
pub fn find(root: &Path) -> CopyTls {
    let settings = fs::read_to_string(root.join(SETTINGS)).unwrap_or_default();
    let set = |key| values(&settings, key).last();
    let directory = match set("migrate_tls_x509_cert_dir") {
        Some(directory) => directory,
        None if below(root, OF_MIGRATION).is_dir() => OF_MIGRATION,
        None => set("default_tls_x509_cert_dir").unwrap_or(OF_ALL),
    };
    let is_root = set("user").is_some_and(|user| ROOT.contains(&user));
    let end = |certificate: &str, key: &str| {
        let files = ["ca-cert.pem", certificate, key].map(|name| Path::new(directory).join(name));
        check(root, &files, is_root)
    };
    CopyTls {
        client: end("client-cert.pem", "client-key.pem"),
        server: end("server-cert.pem", "server-key.pem"),
    }
}

/// Checks the files of one end. The last file is the key.
fn check(root: &Path, files: &[PathBuf], is_root: bool) -> Result<(), NoCopyTls> {
    for file in files {
        let Ok(metadata) = fs::metadata(below(root, &file.to_string_lossy())) else {
            return Err(NoCopyTls::Missing(file.clone()));
        };
        let is_for_root = metadata.uid() == 0 && metadata.mode() & 0o077 == 0;
        if is_for_root && !is_root {
            return Err(NoCopyTls::Unreadable(file.clone()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown};

    use tempfile::TempDir;

    use super::*;

    const FILES: [&str; 5] = [
        "ca-cert.pem",
        "client-cert.pem",
        "client-key.pem",
        "server-cert.pem",
        "server-key.pem",
    ];

    fn write(root: &TempDir, path: &str, text: &str) {
        let path = below(root.path(), path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Makes a host with all files, readable by everybody, in `directory`.
    fn host(directory: &str) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        for name in FILES {
            write(&root, &format!("{directory}/{name}"), "PEM");
        }
        root
    }

    const BOTH: CopyTls = CopyTls {
        client: Ok(()),
        server: Ok(()),
    };

    #[test]
    fn host_without_certificates_names_the_first_that_is_missing() {
        let root = tempfile::tempdir().unwrap();
        let missing = Err(NoCopyTls::Missing("/etc/pki/qemu/ca-cert.pem".into()));
        assert_eq!(find(root.path()).client, missing);
        assert_eq!(find(root.path()).server, missing);
    }

    #[test]
    fn each_end_needs_its_own() {
        let root = host(OF_ALL);
        assert_eq!(find(root.path()), BOTH);
        fs::remove_file(below(root.path(), "/etc/pki/qemu/server-key.pem")).unwrap();
        let found = find(root.path());
        let missing = NoCopyTls::Missing("/etc/pki/qemu/server-key.pem".into());
        assert_eq!((found.client, found.server), (Ok(()), Err(missing)));
    }

    #[test]
    fn directory_is_where_libvirt_has_it() {
        assert_eq!(find(host(OF_MIGRATION).path()), BOTH);
        for key in ["default_tls_x509_cert_dir", "migrate_tls_x509_cert_dir"] {
            let root = host("/srv/tls");
            write(&root, SETTINGS, &format!("{key} = \"/srv/tls\"\n"));
            assert_eq!(find(root.path()), BOTH, "{key}");
        }
        let root = host("/srv/tls");
        let set = "default_tls_x509_cert_dir = \"/srv/tls\"\nmigrate_tls_x509_cert_dir = \"/elsewhere\"\n";
        write(&root, SETTINGS, set);
        let missing = NoCopyTls::Missing("/elsewhere/ca-cert.pem".into());
        assert_eq!(find(root.path()).client, Err(missing));
    }

    #[test]
    fn key_that_only_root_can_read_is_none_for_qemu_unless_that_runs_as_root() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let root = host(OF_ALL);
        let key = below(root.path(), "/etc/pki/qemu/client-key.pem");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        let unreadable = NoCopyTls::Unreadable("/etc/pki/qemu/client-key.pem".into());
        assert_eq!(find(root.path()).client, Err(unreadable));
        write(&root, SETTINGS, "user = \"root\"\n");
        assert_eq!(find(root.path()).client, Ok(()));
        write(&root, SETTINGS, "#user = \"root\"\n");
        chown(&key, Some(64055), None).unwrap();
        assert_eq!(find(root.path()).client, Ok(()));
    }
}
