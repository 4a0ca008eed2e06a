//! The lab in which Roamcast is tested.
//!
//! The lab has a sender, a multicast router, and two sites. Each site has an access switch and a VM
//! host (VMS) behind it. Every node is a network namespace:
//!
//! ```text
//!                        +--------+ site1  +---------+      +------------------+
//!  +--------+            |        +--------+ switch1 +------+ vms1 br0 libvirtd|
//!  | sender +------------+ router |        +---------+      +------------------+
//!  +--------+  backbone  |        +--------+ switch2 +------+ vms2 br0 libvirtd|
//!                        +--------+ site2  +---------+      +------------------+
//! ```
//!
//! Both VM hosts may also share site 1, for a live migration within a subnet.
//!
//! | module | holds |
//! |---|---|
//! | [`topology`] | [`Lab`]: builds and removes the whole lab |
//! | [`node`] | one namespace: commands and processes in it |
//! | [`vms`] | a VM host: private directories, bridge, libvirtd |
//! | [`mroute`] | the router's multicast routing |
//! | [`registry`] | the existing labs, for removal after a crash |
//! | [`netns`] | namespaces and links |
//! | [`guest`] | the guest: image, domain XML, control channel |
//! | [`probe`] | the stream: sender, records, metrics, picture |
//! | [`scenario`] | a guest under a stream, and its migration |
//! | [`listener`] | source-specific joins |
//! | [`host`] | a host with directories of its own: a VM host, a relay and so on |
//! | [`kernel`] | Debian's packaged kernels |
//! | [`kvm`] | checks whether KVM works |
//! | [`machine`] | a stock kernel in an emulated machine that runs a command |
//! | [`mod@bench`] | reports and pictures of the benches |
//! | [`main_loop`] | a process that reads TAPs like QEMU's main thread, without a VM |
//! | [`confine`] | the restrictions of a systemd unit, without systemd |
//! | [`requirements`] | requirements of the lab, for tests to skip |
//! | [`binaries`] | paths of the lab's own programs |
//! | [`wait`] | waiting for a condition with a deadline |

pub mod bench;
pub mod binaries;
mod build;
pub mod confine;
pub mod guest;
pub mod host;
pub mod kernel;
pub mod kvm;
pub mod listener;
pub mod machine;
pub mod main_loop;
pub mod mroute;
pub mod netns;
pub mod node;
pub mod probe;
pub mod registry;
pub mod requirements;
pub mod scenario;
mod signal;
mod switch;
pub mod topology;
pub mod vms;
pub mod wait;

pub use topology::{Lab, LabConfig, Site};
