//! Simulations of nodes and mapping servers on a virtual clock and an unreliable network.

mod attacks;
mod bounds;
mod moves;
mod schedules;
mod servers;
mod sessions;
mod squatters;
mod world;
