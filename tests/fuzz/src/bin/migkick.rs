//! The targets of `migkick`: the VM's side of a move, and a node.

#![no_main]

roamcast_fuzz::binary!(migkick::fuzz::TARGETS);
