//! Code that the host programs (`src/main.rs`) and the programs of a MAT node (`src/guest/main.rs`)
//! share: skb access, FIB look-ups, verdicts and inline assembly. The programs are binaries of this
//! crate.

#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod instruction;
pub mod route;
pub mod skb;
pub mod verdict;
