//! Builds the kernel programs of a node into `OUT_DIR/guest`.

#![allow(unsafe_code, reason = "setting an environment variable is unsafe")]

#[path = "../agent-ebpf/build/embed.rs"]
mod embed;

fn main() -> anyhow::Result<()> {
    embed::embed(&["guest"], &[])
}
