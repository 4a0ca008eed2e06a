//! A host of the lab with directories of its own: a VM host, a relay, a mapping server or a
//! correspondent.
//!
//! One process per host, [`crate::vms::node::run`] in `lab-node`, creates the host's mount and UTS
//! namespaces. The host therefore has its own `/run`, `/etc/hosts` and BPF file system.

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

    /// Returns the directory that holds all private files of this host.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the global address: on `br0` of a VM host, on `eth0` of another host.
    #[must_use]
    pub fn address(&self) -> Ipv6Addr {
        self.address
    }

    /// Returns the path of this host's `/run` as seen from outside.
    #[must_use]
    pub fn run_directory(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Returns the path of this host's `/run/roamcast-lab` as seen from outside. QEMU can reach
    /// Unix sockets in this directory.
    #[must_use]
    pub fn shared_directory(&self) -> PathBuf {
        self.run_directory().join("roamcast-lab")
    }
}
