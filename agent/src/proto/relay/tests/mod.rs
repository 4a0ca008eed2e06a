//! A relay on a virtual clock, with a kernel and agents that only remember.

mod adoption;
mod fixture;
mod limits;
mod random;
mod session;
