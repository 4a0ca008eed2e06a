//! Simulations: nodes and mapping servers on a virtual clock and a network that does what networks do.

mod attacks;
mod bounds;
mod moves;
mod schedules;
mod servers;
mod sessions;
mod squatters;
mod world;
