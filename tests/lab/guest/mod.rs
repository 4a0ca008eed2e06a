//! Guests of the lab: a Debian cloud kernel with the project's initramfs, under libvirt or plain
//! QEMU.
//!
//! ```text
//!  host                                              guest
//!  Control --- unix socket --- QEMU --- virtio-serial --- `guest` binary (PID 1)
//!    |   commands, length-framed JSON  ------------>        | runs programs, joins, receives
//!    |   <------------ replies, output, received packets    |
//! ```
//!
//! - [`image`] builds the kernel and the initramfs if their inputs have changed.
//! - [`domain`] writes the libvirt domain XML.
//! - [`qemu`] runs a guest under plain QEMU.
//! - [`wire`] defines the frames and the messages between host and guest.
//! - [`control`] is the host's side, which follows a guest from one VM host to the other.
//! - [`program`] runs programs in a guest.
//!
//! The guest's side of the control channel is the binary `guest` in `tests/bin/guest`.

pub mod control;
pub(crate) mod cpio;
pub mod domain;
pub mod image;
pub mod program;
pub mod qemu;
pub mod sys;
pub mod wire;
