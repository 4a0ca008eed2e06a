//! Installs and removes the script that libvirt runs.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// libvirt's default directory of hooks.
pub const DEFAULT_DIRECTORY: &str = "/etc/libvirt/hooks";
/// Second line of the script, which identifies the script as Roamcast's.
const MARK: &str = "# Made by `roamcast hook install`; `roamcast hook uninstall` removes it.";
/// Largest file that can be Roamcast's script, bytes.
const MAX_SCRIPT_BYTES: u64 = 64 * 1024;

/// Why installing or removing the hook failed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// Another program's hook has the path.
    #[error("{} is not Roamcast's; move it elsewhere in that directory and try again", path.display())]
    Foreign {
        /// Path of the file.
        path: PathBuf,
    },
    /// The directory has no hook of Roamcast.
    #[error("There is no hook of Roamcast's at {}; name libvirt's directory with --directory", path.display())]
    NotInstalled {
        /// Path at which the script would be.
        path: PathBuf,
    },
    /// The script cannot contain the path, which is not UTF-8.
    #[error("The path {} is not UTF-8; choose another one for the program or its socket", path.display())]
    Path {
        /// Path of the program or its socket.
        path: PathBuf,
    },
    /// The file system refuses.
    #[error("Cannot write {}; run the command as root", path.display())]
    Write {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
}

/// Writes the script to a directory of hooks, or replaces an older script of Roamcast. Returns the
/// script's path.
///
/// # Errors
///
/// [`InstallError`].
pub fn install(directory: &Path, binary: &Path, socket: &Path) -> Result<PathBuf, InstallError> {
    let path = script_path(directory);
    let text = script(binary, socket)?;
    if !is_free_or_ours(&path)? {
        return Err(InstallError::Foreign { path });
    }
    let failed = |source| InstallError::Write {
        path: path.clone(),
        source,
    };
    // The script is renamed into place, so libvirt never runs half a script. libvirt ignores the
    // first name.
    let new = directory.join(".roamcast.new");
    let write = || {
        fs::create_dir_all(path.parent().unwrap_or(directory))?;
        let _ = fs::remove_file(&new);
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&new)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        drop(file);
        fs::rename(&new, &path)
    };
    write().map_err(failed)?;
    Ok(path)
}

/// Removes the script from a directory of hooks. Returns the script's former path.
///
/// # Errors
///
/// [`InstallError`].
pub fn uninstall(directory: &Path) -> Result<PathBuf, InstallError> {
    let path = script_path(directory);
    if !is_free_or_ours(&path)? {
        return Err(InstallError::Foreign { path });
    }
    match fs::remove_file(&path) {
        Ok(()) => Ok(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(InstallError::NotInstalled { path })
        }
        Err(source) => Err(InstallError::Write { path, source }),
    }
}

fn script_path(directory: &Path) -> PathBuf {
    directory.join("qemu.d").join("roamcast")
}

fn is_free_or_ours(path: &Path) -> Result<bool, InstallError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(source) => {
            let path = path.to_owned();
            return Err(InstallError::Write { path, source });
        }
    };
    if !metadata.is_file() || metadata.len() > MAX_SCRIPT_BYTES {
        return Ok(false);
    }
    let text = fs::read(path).unwrap_or_default();
    Ok(text.split(|byte| *byte == b'\n').nth(1) == Some(MARK.as_bytes()))
}

/// Returns the text of the script. Whatever happens to the program, the script prints nothing and
/// succeeds.
fn script(binary: &Path, socket: &Path) -> Result<String, InstallError> {
    let binary = quoted(binary)?;
    let socket = quoted(socket)?;
    Ok(format!(
        "#!/bin/sh\n\
         {MARK}\n\
         # libvirt waits for it when a migration comes in, and lets the domain in whatever it does.\n\
         [ \"$2 $3\" = \"migrate begin\" ] || exit 0\n\
         {binary} hook run --socket {socket} -- \"$@\" >/dev/null\n\
         exit 0\n"
    ))
}

/// Quotes a path as one word of the shell.
fn quoted(path: &Path) -> Result<String, InstallError> {
    let text = path.to_str().ok_or_else(|| InstallError::Path {
        path: path.to_owned(),
    })?;
    Ok(format!("'{}'", text.replace('\'', "'\\''")))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Output, Stdio};

    use super::*;

    const SOCKET: &str = "/run/it's here/agent.sock";

    fn run(script: &Path, arguments: &[&str]) -> Output {
        Command::new(script)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Makes a program that writes its arguments to a file, prints a line, and fails.
    fn program(directory: &Path) -> (PathBuf, PathBuf) {
        let (path, log) = (directory.join("it's roamcast"), directory.join("log"));
        let text = format!(
            "#!/bin/sh\nprintf '%s|' \"$@\" >{}\necho loud\nexit 7\n",
            log.display()
        );
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        (path, log)
    }

    #[test]
    fn script_runs_the_program_when_a_migration_begins_and_never_fails_nor_prints() {
        let directory = tempfile::tempdir().unwrap();
        let (binary, log) = program(directory.path());
        let hooks = directory.path().join("hooks");
        let script = install(&hooks, &binary, Path::new(SOCKET)).unwrap();
        assert_eq!(script, hooks.join("qemu.d/roamcast"));
        for arguments in [
            &["viewer", "start", "begin", "-"][..],
            &["viewer", "migrate", "end", "-"],
            &["viewer", "migrate"],
            &[],
        ] {
            let output = run(&script, arguments);
            assert!(output.status.success() && output.stdout.is_empty());
            assert!(!log.exists(), "{arguments:?}");
        }
        let output = run(&script, &["-x y", "migrate", "begin", "-"]);
        assert!(output.status.success() && output.stdout.is_empty());
        assert_eq!(
            fs::read_to_string(&log).unwrap(),
            format!("hook|run|--socket|{SOCKET}|--|-x y|migrate|begin|-|")
        );
        fs::remove_file(&binary).unwrap();
        let output = run(&script, &["viewer", "migrate", "begin", "-"]);
        assert!(output.status.success() && output.stdout.is_empty());
    }

    #[test]
    fn script_of_ours_is_replaced_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let hooks = directory.path();
        let binary = Path::new("/usr/bin/roamcast");
        install(hooks, Path::new("/old/roamcast"), Path::new(SOCKET)).unwrap();
        let path = install(hooks, binary, Path::new(SOCKET)).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("/usr/bin/"));
        let names: Vec<_> = fs::read_dir(hooks.join("qemu.d")).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
        assert_eq!(uninstall(hooks).unwrap(), path);
        let again = uninstall(hooks).unwrap_err();
        assert!(matches!(again, InstallError::NotInstalled { .. }));
    }

    #[test]
    fn file_of_somebody_else_is_neither_replaced_nor_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qemu.d/roamcast");
        fs::create_dir(directory.path().join("qemu.d")).unwrap();
        let binary = Path::new("/usr/bin/roamcast");
        for text in ["", "#!/bin/sh\n", "#!/bin/sh\n# Made by hand\n", "\u{0}"] {
            fs::write(&path, text).unwrap();
            let foreign = |result: Result<PathBuf, InstallError>| {
                assert!(matches!(result, Err(InstallError::Foreign { .. })));
            };
            foreign(install(directory.path(), binary, Path::new(SOCKET)));
            foreign(uninstall(directory.path()));
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
