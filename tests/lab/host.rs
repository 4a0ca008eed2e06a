//! A host of the lab with directories of its own: a VM host, a relay, a mapping server, a correspondent.
//!
//! One process, [`crate::vms::node::run`] in `lab-node`, makes its mount and UTS namespaces, so it
//! has its own `/run`, `/etc/hosts` and BPF file system.

use std::net::Ipv6Addr;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use crate::node::Node;

/// A host of the lab.
#[derive(Debug, Clone)]
pub struct Host {
    node: Node,
    address: Ipv6Addr,
    directory: PathBuf,
}

impl Deref for Host {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}

impl Host {
    pub(crate) fn new(node: Node, address: Ipv6Addr, directory: PathBuf) -> Self {
        Self {
            node,
            address,
            directory,
        }
    }

    /// Directory of everything private to this host.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its global address: on `br0` of a VM host, on `eth0` of another.
    #[must_use]
    pub fn address(&self) -> Ipv6Addr {
        self.address
    }

    /// What is `/run` on this host, as seen from outside.
    #[must_use]
    pub fn run_directory(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// The directory that is `/run/roamcast-lab` on this host, as seen from outside: Unix sockets
    /// made here can be reached by QEMU.
    #[must_use]
    pub fn shared_directory(&self) -> PathBuf {
        self.run_directory().join("roamcast-lab")
    }
}
