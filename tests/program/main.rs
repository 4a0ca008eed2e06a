//! Kernel programs by program test-run: a test gives a program one frame, and checks the verdict, the
//! frame and the maps. Needs root.

mod forward_programs;
mod gate_programs;
mod gate_races;
mod mat_programs;
mod object;
mod parity;
mod prog_test_run;
mod relay_programs;
mod trace_programs;
