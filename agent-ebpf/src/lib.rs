//! What the kernel programs of the host (`src/main.rs`) and of a node (`src/guest/main.rs`) share.
//! The programs themselves are binaries.

#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod instruction;
pub mod route;
pub mod skb;
pub mod verdict;
