//! Network namespaces for tests.

use std::process::Command;
use std::sync::mpsc;
use std::thread;

use nix::sched::{CloneFlags, unshare};

/// Runs `body` on a thread in a new network namespace, which ends with the thread. Without the
/// privilege the test is skipped, except in CI.
pub(crate) fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => body(),
        Err(error) if std::env::var_os("CI").is_some() => panic!("no namespace: {error}"),
        Err(error) => eprintln!("skipped: no namespace: {error}"),
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with the words of `line` in the thread's namespace.
pub(crate) fn ip(line: &str) -> String {
    let output = Command::new("ip")
        .args(line.split_whitespace())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Disables duplicate address detection for NICs created later, so that their link-local addresses
/// are usable at once.
pub(crate) fn without_dad() {
    std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
}

/// A thread in a namespace of its own that runs `body` on a signal. The namespace and its links
/// live as long as the value.
pub(crate) struct Neighbour<T> {
    go: mpsc::Sender<()>,
    result: mpsc::Receiver<T>,
    /// Thread identifier, which `ip link set .. netns` takes for the namespace.
    pub(crate) tid: i32,
}

impl<T: Send + 'static> Neighbour<T> {
    pub(crate) fn start(body: impl FnOnce() -> T + Send + 'static) -> Self {
        let (go, gone) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let (done, result) = mpsc::channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            without_dad();
            ready.send(nix::unistd::gettid().as_raw()).unwrap();
            if gone.recv().is_ok() && done.send(body()).is_ok() {
                // Blocks until the sender is dropped.
                let _ = gone.recv();
            }
        });
        let tid = is_ready.recv().unwrap();
        Self { go, result, tid }
    }

    pub(crate) fn run(&self) {
        self.go.send(()).unwrap();
    }

    /// Waits for the result of `body`; panics when `body` panicked.
    pub(crate) fn result(&self) -> T {
        self.result.recv().unwrap()
    }
}
