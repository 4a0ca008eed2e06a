//! The main loop of the QEMU behind a TAP: whether it sleeps.
//!
//! Once a VM has stopped, QEMU's main thread reads one more frame of each TAP, sooner or later: not
//! before the thread that saves the device state lets go of QEMU's big lock. A frame that enters a TAP
//! wakes the thread that polls the TAP within the call that puts the frame there. So a main thread that
//! is asleep in `poll` while a frame waits does not poll that TAP: it has read what it will ever read.
//!
//! `/proc/PID/stat` and then `/proc/PID/syscall` say so: `syscall` alone also shows a thread that was
//! woken and has no processor yet. Should the thread have gone from another wait to `poll` between the
//! two, it went there with the frame waiting. Reading `syscall` needs `CAP_SYS_PTRACE`, and a kernel with
//! `CONFIG_HAVE_ARCH_TRACEHOOK`, as those of distributions are.

use std::ffi::OsStr;
use std::fs::{self, DirEntry, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::proto::handover::Reader;

/// What a TAP's file descriptor is a link to.
const TUN: &str = "/dev/net/tun";
/// What the name of a QEMU's main thread begins with (`qemu-system-x86`, `qemu-kvm`).
const QEMU: &str = "qemu";
/// State of a thread that waits and can be interrupted.
const SLEEPING: char = 'S';
/// Room for one line of `/proc/PID/syscall`, which is nine numbers, and for the beginning of `stat`.
const LINE_BYTES: usize = 256;

/// System calls in which a main loop waits for something to do.
const WAITS: &[libc::c_long] = &[
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_io_uring_enter,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_select,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
];

/// The main thread of a QEMU. Reading the files fails once the process is gone.
#[derive(Debug)]
pub struct MainLoop {
    /// Number of the process, and of its main thread.
    process: u32,
    /// The process's descriptors of the TAP, one for each queue.
    descriptors: Vec<u32>,
    /// `/proc/PID/stat`.
    stat: File,
    /// `/proc/PID/syscall`.
    syscall: File,
}

impl MainLoop {
    /// Finds the QEMU in this thread's network namespace that has opened a TAP, by its name. Reads the
    /// descriptors of every QEMU of the host.
    pub fn of_tap(name: &str) -> Option<Self> {
        let namespace = fs::read_link("/proc/thread-self/ns/net").ok()?;
        let is_here = |process: &Path| {
            is_qemu(process)
                && fs::read_link(process.join("ns/net")).is_ok_and(|it| it == namespace)
        };
        fs::read_dir("/proc")
            .ok()?
            .flatten()
            .map(|entry| entry.path())
            .filter(|process| is_here(process))
            .find_map(|process| {
                let descriptors = descriptors_of(&process, name);
                (!descriptors.is_empty()).then(|| Self::open(&process, descriptors))?
            })
    }

    /// Opens the files of a thread, whose directory in `/proc` is given.
    fn open(thread: &Path, descriptors: Vec<u32>) -> Option<Self> {
        Some(Self {
            process: number(thread.file_name()?)?,
            descriptors,
            stat: File::open(thread.join("stat")).ok()?,
            syscall: File::open(thread.join("syscall")).ok()?,
        })
    }

    /// Number of the process, and of its main thread.
    pub fn process(&self) -> u32 {
        self.process
    }

    /// The process's descriptors of the TAP, one for each queue that it has opened.
    pub fn descriptors(&self) -> &[u32] {
        &self.descriptors
    }

    /// What the thread does at this moment.
    pub fn look(&self) -> Reader {
        let sleeps = match read(&self.stat, state) {
            Some(state) => state == SLEEPING,
            None => return Reader::Unknown,
        };
        if sleeps {
            read(&self.syscall, |line| Some(reader(line))).unwrap_or_default()
        } else {
            Reader::Busy
        }
    }
}

/// Reads the beginning of a file that is made anew for each read.
fn read<T>(file: &File, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
    let mut text = [0; LINE_BYTES];
    let length = file.read_at(&mut text, 0).ok()?;
    parse(&String::from_utf8_lossy(text.get(..length)?))
}

/// The state in `/proc/PID/stat`: it follows the name, which is in parentheses and may have some.
fn state(stat: &str) -> Option<char> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.chars().next()
}

fn is_qemu(process: &Path) -> bool {
    fs::read_to_string(process.join("comm")).is_ok_and(|name| name.starts_with(QEMU))
}

/// A process's descriptors of a TAP.
fn descriptors_of(process: &Path, name: &str) -> Vec<u32> {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else {
        return Vec::new();
    };
    let is_of_tap = |descriptor: &DirEntry| {
        let is_tun = fs::read_link(descriptor.path()).is_ok_and(|file| file == Path::new(TUN));
        is_tun
            && fs::read_to_string(process.join("fdinfo").join(descriptor.file_name()))
                .is_ok_and(|info| interface(&info) == Some(name))
    };
    descriptors
        .flatten()
        .filter(is_of_tap)
        .filter_map(|descriptor| number(&descriptor.file_name()))
        .collect()
}

/// The number that a file of `/proc` is called by.
fn number(name: &OsStr) -> Option<u32> {
    name.to_str()?.parse().ok()
}

/// The interface that a descriptor of [`TUN`] is attached to, as its `fdinfo` says.
fn interface(info: &str) -> Option<&str> {
    info.lines()
        .find_map(|line| line.strip_prefix("iff:"))
        .map(str::trim)
}

/// What a line of `/proc/PID/syscall` says: `running`, or the number of the system call in which the
/// thread is blocked, which is -1 for none.
fn reader(line: &str) -> Reader {
    let call = line.split_whitespace().next();
    match call.map(str::parse::<libc::c_long>) {
        Some(Ok(call)) if WAITS.contains(&call) => Reader::Asleep,
        Some(_) => Reader::Busy,
        None => Reader::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    #[test]
    fn line_of_proc_is_read() {
        assert_eq!(reader("running\n"), Reader::Busy);
        assert_eq!(
            reader(&format!("{} 0x1 0x2\n", libc::SYS_ppoll)),
            Reader::Asleep
        );
        assert_eq!(reader(&format!("{} 0x1\n", libc::SYS_futex)), Reader::Busy);
        assert_eq!(reader("-1 0x7ffc 0x7f21\n"), Reader::Busy);
        assert_eq!(reader(""), Reader::Unknown);
    }

    #[test]
    fn state_follows_the_name_whatever_that_is() {
        assert_eq!(state("12 (qemu) S 1 12"), Some('S'));
        assert_eq!(state("12 (a) R (b)) D 1"), Some('D'));
        assert_eq!(state("12"), None);
    }

    #[test]
    fn interface_of_a_descriptor_is_found() {
        let info = "pos:\t0\nflags:\t0104002\nmnt_id:\t26\niff:\tvnet12\n";
        assert_eq!(interface(info), Some("vnet12"));
        assert_eq!(interface("pos:\t0\n"), None);
    }

    #[test]
    fn thread_in_poll_is_asleep_and_one_that_was_woken_is_not() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            use std::os::fd::AsFd as _;
            sender.send(nix::unistd::gettid()).unwrap();
            let mut fds = [PollFd::new(theirs.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE).unwrap();
            // Waits elsewhere, as for a lock.
            thread::park_timeout(Duration::from_secs(20));
        });
        let tid = receiver.recv().unwrap();
        let directory = format!("/proc/self/task/{tid}");
        let Some(thread_state) = MainLoop::open(Path::new(&directory), Vec::new()) else {
            println!("skipped: this kernel has no /proc/PID/syscall");
            return;
        };
        let until = |wanted| {
            let deadline = Instant::now() + Duration::from_secs(20);
            while thread_state.look() != wanted {
                assert!(Instant::now() < deadline, "{:?}", thread_state.look());
                thread::yield_now();
            }
        };
        until(Reader::Asleep);
        // Is awake once the call that woke it has returned.
        std::io::Write::write_all(&mut &ours, b"x").unwrap();
        assert_eq!(thread_state.look(), Reader::Busy);
        until(Reader::Busy);
        thread.thread().unpark();
        thread.join().unwrap();
    }
}
