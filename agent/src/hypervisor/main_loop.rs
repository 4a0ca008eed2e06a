//! Observes whether the main loop of the QEMU behind a TAP sleeps.
//!
//! After the stop of a VM, QEMU's main thread reads at most one more frame from each TAP, but not
//! before the thread that saves the device state releases QEMU's big lock. A frame that enters a
//! TAP wakes the polling thread in the same call. A main thread that sleeps in `poll` while a frame
//! waits therefore does not poll this TAP: QEMU will read nothing more from it.
//!
//! The observation reads `/proc/PID/stat` and then `/proc/PID/syscall`. `syscall` alone is not
//! enough: it also shows a system call for a woken thread that has no processor yet. If the thread
//! moves from another wait to `poll` between the two reads, it enters `poll` with the frame
//! waiting, so the conclusion holds. Reading `syscall` needs `CAP_SYS_PTRACE` and a kernel with
//! `CONFIG_HAVE_ARCH_TRACEHOOK`, which distributions set.

use std::ffi::OsStr;
use std::fs::{self, DirEntry, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use crate::proto::handover::Reader;

/// Target of the link of a TAP's file descriptor.
const TUN: &str = "/dev/net/tun";
/// Prefix of the name of QEMU's main thread (`qemu-system-x86`, `qemu-kvm`).
const QEMU: &str = "qemu";
/// State of a thread in an interruptible wait.
const SLEEPING: char = 'S';
/// Room for one line of `/proc/PID/syscall` (nine numbers), or for the beginning of `stat`.
const LINE_BYTES: usize = 256;

/// System calls in which a main loop waits for events.
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

/// The main thread of a QEMU. Reading the files fails after the process has ended.
#[derive(Debug)]
pub struct MainLoop {
    /// Process identifier, which is also the thread identifier of the main thread.
    process: u32,
    /// File descriptors of the TAP in this process, one for each queue.
    descriptors: Vec<u32>,
    /// The file `/proc/PID/stat`.
    stat: File,
    /// The file `/proc/PID/syscall`.
    syscall: File,
}

impl MainLoop {
    /// Finds the QEMU that has opened a TAP, by the TAP's name, in this thread's network namespace.
    /// Reads the file descriptors of every QEMU on the host.
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

    /// Opens the files of a thread; `thread` is the thread's directory in `/proc`.
    fn open(thread: &Path, descriptors: Vec<u32>) -> Option<Self> {
        Some(Self {
            process: number(thread.file_name()?)?,
            descriptors,
            stat: File::open(thread.join("stat")).ok()?,
            syscall: File::open(thread.join("syscall")).ok()?,
        })
    }

    /// Returns the process identifier.
    pub fn process(&self) -> u32 {
        self.process
    }

    /// Returns the process's file descriptors of the TAP, one for each open queue.
    pub fn descriptors(&self) -> &[u32] {
        &self.descriptors
    }

    /// Returns what the thread does at this moment.
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

/// Reads the beginning of a file in `/proc`, whose content the kernel makes at each read.
fn read<T>(file: &File, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
    let mut text = [0; LINE_BYTES];
    let length = file.read_at(&mut text, 0).ok()?;
    parse(&String::from_utf8_lossy(text.get(..length)?))
}

/// Returns the state in `/proc/PID/stat`. The state follows the name, which is in parentheses and
/// may contain parentheses.
fn state(stat: &str) -> Option<char> {
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.chars().next()
}

fn is_qemu(process: &Path) -> bool {
    fs::read_to_string(process.join("comm")).is_ok_and(|name| name.starts_with(QEMU))
}

/// Returns the file descriptors of a process that are open on a TAP.
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

/// Parses a file name in `/proc` as a number.
fn number(name: &OsStr) -> Option<u32> {
    name.to_str()?.parse().ok()
}

/// Returns the interface of a descriptor of [`TUN`], as `fdinfo` shows it.
fn interface(info: &str) -> Option<&str> {
    info.lines()
        .find_map(|line| line.strip_prefix("iff:"))
        .map(str::trim)
}

/// Interprets a line of `/proc/PID/syscall`: `running`, or the number of the system call in which
/// the thread is blocked (-1: none).
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
            // Waits in a futex, not in `poll`.
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
        // The call that wakes the thread returns after the wake-up.
        std::io::Write::write_all(&mut &ours, b"x").unwrap();
        assert_eq!(thread_state.look(), Reader::Busy);
        until(Reader::Busy);
        thread.thread().unpark();
        thread.join().unwrap();
    }
}
