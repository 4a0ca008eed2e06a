//! Sockets that systemd keeps while this program is not there (`FileDescriptorStoreMax=`), so that
//! what they have joined stays joined. Without systemd nothing is kept.

#![allow(
    unsafe_code,
    reason = "descriptors that systemd hands over come as bare numbers"
)]

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use sd_notify::NotifyState;

/// What the names of our descriptors begin with.
const PREFIX: &str = "join-";

/// The sockets given to systemd, in the order of their list.
#[derive(Debug)]
pub struct FdStore {
    tag: u32,
    names: Vec<String>,
    number: u64,
}

impl FdStore {
    /// Nothing is given yet. `tag` tells the names apart from those of another list.
    pub fn new(tag: u32) -> Self {
        Self {
            tag,
            names: Vec::new(),
            number: 0,
        }
    }

    /// Gives to systemd what is new at the end of a list of sockets, and takes back what is gone
    /// from its end.
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

/// Sockets of an earlier process. systemd keeps them, beyond this process too, until they are
/// closed.
#[derive(Debug)]
pub struct Inherited {
    sockets: Vec<(OwnedFd, String)>,
}

impl Inherited {
    /// Takes over what systemd has handed to this process. To be called once.
    pub fn take() -> Self {
        let sockets = match sd_notify::listen_fds_with_names() {
            Ok(descriptors) => descriptors
                .filter(|(_, name)| name.starts_with(PREFIX))
                // SAFETY: systemd has opened these for this process (`LISTEN_PID` was checked), no
                // other part of it takes descriptors from systemd, and this is called once.
                .map(|(descriptor, name)| (unsafe { OwnedFd::from_raw_fd(descriptor) }, name))
                .collect(),
            Err(error) => {
                tracing::warn!(%error, "Descriptors of systemd are not understood");
                Vec::new()
            }
        };
        Self { sockets }
    }

    /// Closes them, and has systemd close them.
    pub fn close(self) {
        for (_, name) in &self.sockets {
            remove(name);
        }
    }

    /// Their number.
    pub fn len(&self) -> usize {
        self.sockets.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sockets.is_empty()
    }
}
