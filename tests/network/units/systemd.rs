//! The services of systemd that the tests need: restrictions, notifications, directories,
//! credentials.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use lab::binaries;
use lab::confine::{self, ControlGroup, DYNAMIC_USER, Unit};
use support::netns::{privileged, wait_for};

/// Longest time between two signs of life of a service's loop, µs.
const WATCHDOG_USEC: u32 = 2_000_000;

/// Returns the path of a unit's file in the source tree.
pub(super) fn unit(name: &str) -> PathBuf {
    let package = if name == "migkick-node" {
        "migkick"
    } else {
        "agent"
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    root.join(package)
        .join("dist")
        .join(format!("{name}.service"))
}

/// Returns a control group with the limits of a unit.
pub(super) fn group(name: &str) -> ControlGroup {
    ControlGroup::new(&Unit::read(&unit(name)).unwrap()).unwrap()
}

/// Returns true if `systemd-analyze` exists, and prints the reason of the skip otherwise. Panics in
/// CI, which must have the program.
pub(super) fn known() -> bool {
    let is_possible = confine::is_possible();
    if !is_possible {
        assert!(
            std::env::var("CI").as_deref() != Ok("true"),
            "what units mean is asked of systemd-analyze"
        );
        println!("skipped: needs systemd-analyze");
    }
    is_possible
}

/// Returns true if the tests can start services: as root, with `systemd-analyze`.
pub(super) fn possible() -> bool {
    privileged() && known()
}

/// Starts the services of a unit in a control group with the unit's limits, and receives their
/// notifications.
pub(super) struct Systemd {
    unit: PathBuf,
    group: ControlGroup,
    socket: UnixDatagram,
    path: PathBuf,
    beats: usize,
    ready: bool,
}

impl Systemd {
    /// Prepares the services of a unit, with the notification socket in a directory.
    pub(super) fn new(name: &str, directory: &Path) -> Self {
        let path = directory.join("notify");
        let _ = fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o777)).unwrap();
        Self {
            unit: unit(name),
            group: group(name),
            socket,
            path,
            beats: 0,
            ready: false,
        }
    }

    /// Returns a command that runs one of the project's programs under the restrictions of the
    /// unit. The program may also write to `writable`.
    pub(super) fn command(&self, writable: &[&Path], program: &str) -> Command {
        let program = binaries::path(program).unwrap();
        let mut command = confine::command(&self.unit, &self.group, writable, &program).unwrap();
        command
            .env("NOTIFY_SOCKET", &self.path)
            .env("WATCHDOG_USEC", WATCHDOG_USEC.to_string());
        command
    }

    /// Waits until the service is ready and its loop has sent two signs of life. The service must
    /// then run in the group and have met no limit.
    pub(super) fn wait(&mut self) {
        wait_for("READY=1 and two signs of life", || {
            let mut text = [0; 1024];
            while let Ok(length) = self.socket.recv(&mut text) {
                let said = String::from_utf8_lossy(&text[..length]);
                self.ready |= said.contains("READY=1");
                self.beats += usize::from(said.contains("WATCHDOG=1"));
            }
            (self.ready && self.beats >= 2).then_some(())
        });
        assert!(!self.group.members().is_empty(), "it runs elsewhere");
        assert_eq!(self.group.times_met().unwrap(), 0);
    }
}

/// A running service. Dropping the value kills the service.
pub(super) struct Service(Child);

impl Service {
    pub(super) fn start(mut command: Command) -> Self {
        Self(command.spawn().unwrap())
    }

    /// Waits until `condition` returns a value. Panics if the service ends before.
    pub(super) fn wait<T>(&mut self, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        wait_for(what, || {
            let ended = self.0.try_wait().unwrap();
            assert!(ended.is_none(), "before {what}: {ended:?}");
            condition()
        })
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Creates a directory for the user of `DynamicUser=`, as `RuntimeDirectory=` does.
pub(super) fn give(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    fs::set_permissions(directory, Permissions::from_mode(0o700)).unwrap();
    chown(directory, Some(DYNAMIC_USER), Some(DYNAMIC_USER)).unwrap();
}

/// Copies files of root for a service, as `LoadCredential=` does. The copies belong to root and the
/// user may read them, which their mode shows as readable by a group.
pub(super) fn load_credentials(directory: &Path, files: &[(&str, &Path)]) -> PathBuf {
    let credentials = directory.join("credentials");
    fs::create_dir_all(&credentials).unwrap();
    for (name, file) in files {
        let path = credentials.join(name);
        fs::copy(file, &path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o440)).unwrap();
        chown(&path, Some(0), Some(DYNAMIC_USER)).unwrap();
    }
    fs::set_permissions(&credentials, Permissions::from_mode(0o550)).unwrap();
    chown(&credentials, Some(0), Some(DYNAMIC_USER)).unwrap();
    credentials
}

/// Removes keys from a configuration, so that their defaults apply. Returns the removed values.
pub(super) fn take_keys<const N: usize>(config: &Path, keys: [&str; N]) -> [PathBuf; N] {
    let text = fs::read_to_string(config).unwrap();
    let value = |line: &str, key: &str| {
        let rest = line.strip_prefix(key)?.strip_prefix(" = \"")?;
        rest.strip_suffix('"').map(PathBuf::from)
    };
    let values = keys.map(|key| text.lines().find_map(|line| value(line, key)).unwrap());
    let is_kept = |line: &&str| keys.iter().all(|key| value(line, key).is_none());
    let kept: Vec<&str> = text.lines().filter(is_kept).collect();
    fs::write(config, kept.join("\n")).unwrap();
    values
}
