//! Empty library target, so that cargo can depend on this crate; the programs are its binary.

#![no_std]
