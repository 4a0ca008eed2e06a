//! The lab Roamcast is tested in.
//!
//! A sender, a multicast router, two sites with an access switch each and a VM host (VMS) behind
//! every switch, all in network namespaces of their own:
//!
//! ```text
//!                        +--------+ site1  +---------+      +------------------+
//!  +--------+            |        +--------+ switch1 +------+ vms1 br0 libvirtd|
//!  | sender +------------+ router |        +---------+      +------------------+
//!  +--------+  backbone  |        +--------+ switch2 +------+ vms2 br0 libvirtd|
//!                        +--------+ site2  +---------+      +------------------+
//! ```
//!
//! The VM hosts may also share site 1, for a live migration within a subnet.
//!
//! | module | holds |
//! |---|---|
//! | [`topology`] | [`Lab`]: the whole lab, up and down |
//! | [`node`] | one namespace: commands and processes in it |
//! | [`vms`] | a VM host: private directories, bridge, libvirtd |
//! | [`mroute`] | the router's multicast routing |
//! | [`registry`] | what exists, so that it can be removed after a crash |
//! | [`netns`] | namespaces and links |
//! | [`guest`] | the guest: image, domain XML, control channel |
//! | [`probe`] | the stream: sender, records, metrics, picture |
//! | [`scenario`] | a guest under a stream and its move |
//! | [`listener`] | source-specific joins |
//! | [`host`] | a host with directories of its own: a VM host, a relay and so on |
//! | [`kernel`] | Debian's packaged kernels |
//! | [`kvm`] | does KVM really work here? |
//! | [`machine`] | a stock kernel in an emulated machine that runs a command |
//! | [`mod@bench`] | the benches of relay and migration: what they report, and their pictures |
//! | [`main_loop`] | what QEMU's main thread does with TAPs, in a process without a VM |
//! | [`confine`] | the restrictions of a systemd unit, without systemd |
//! | [`requirements`] | what the machine must have, for tests to skip |
//! | [`binaries`] | where the lab's own programs are |
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
