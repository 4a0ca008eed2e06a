//! Sockets that systemd keeps while the agent is not running (`FileDescriptorStoreMax=`), so that
//! their multicast joins persist. Without systemd the joins end with the process.

#![allow(
    unsafe_code,
    reason = "descriptors that systemd hands over come as bare numbers"
)]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use sd_notify::NotifyState;

/// Prefix of the names of the agent's descriptors (`FDNAME=`).
const PREFIX: &str = "join-";

/// The sockets of one list that systemd holds, in the order of the list.
#[derive(Debug)]
pub struct FdStore {
    tag: u32,
    names: Vec<String>,
    number: u64,
}

impl FdStore {
    /// Creates an empty store. `tag` distinguishes the names of this list from those of another
    /// list.
    pub fn new(tag: u32) -> Self {
        Self {
            tag,
            names: Vec::new(),
            number: 0,
        }
    }

    /// Passes the sockets appended to the list to systemd, and removes from systemd those cut off
    /// at its end.
    pub fn follow<'a>(&mut self, sockets: impl Iterator<Item = BorrowedFd<'a>>) {
        let sockets: Vec<BorrowedFd<'a>> = sockets.collect();
        while self.names.len() > sockets.len() {
            if let Some(name) = self.names.pop() {
                remove(&name);
            }
        }
        for socket in sockets.iter().skip(self.names.len()) {
            self.number += 1;
            let name = format!(
                "{PREFIX}{}-{}-{}",
                std::process::id(),
                self.tag,
                self.number
            );
            let state = [NotifyState::FdStore, NotifyState::FdName(&name)];
            if let Err(error) = sd_notify::notify_with_fds(&state, &[*socket]) {
                tracing::warn!(%error, "systemd does not take a socket; its joins end with this process");
            }
            self.names.push(name);
        }
    }
}

fn remove(name: &str) {
    let state = [NotifyState::FdStoreRemove, NotifyState::FdName(name)];
    if let Err(error) = sd_notify::notify(&state) {
        tracing::debug!(%error, name, "systemd does not give a socket back");
    }
}

/// Sockets of an earlier process. systemd keeps them, also after the end of this process, until
/// they are closed here.
#[derive(Debug)]
pub struct Inherited {
    sockets: Vec<(OwnedFd, String)>,
}

impl Inherited {
    /// Takes over the descriptors that systemd passed to this process. Must be called once only.
    pub fn take() -> Self {
        let sockets = match sd_notify::listen_fds_with_names() {
            Ok(descriptors) => descriptors
                .filter(|(_, name)| name.starts_with(PREFIX))
                // SAFETY: systemd opened these descriptors for this process (`LISTEN_PID` was
                // checked), no other part of the process takes descriptors from systemd, and this
                // function is called once.
                .map(|(descriptor, name)| (unsafe { OwnedFd::from_raw_fd(descriptor) }, name))
                .collect(),
            Err(error) => {
                tracing::warn!(%error, "Descriptors of systemd are not understood");
                Vec::new()
            }
        };
        Self { sockets }
    }

    /// Closes the sockets and removes them from systemd's store.
    pub fn close(self) {
        for (_, name) in &self.sockets {
            remove(name);
        }
    }

    /// Number of sockets.
    pub fn len(&self) -> usize {
        self.sockets.len()
    }

    /// Whether there is no socket.
    pub fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }
}
