//! The targets of `common` in a binary of their own: the fewer branches there are to count, the more inputs
//! are tried.

#![no_main]

roamcast_fuzz::binary!(common::fuzz::TARGETS);
