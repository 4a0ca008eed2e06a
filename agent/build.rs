//! Builds the kernel programs of the host into `OUT_DIR/host`.

#![allow(unsafe_code, reason = "setting an environment variable is unsafe")]

#[path = "../agent-ebpf/build/embed.rs"]
mod embed;

fn main() -> anyhow::Result<()> {
    embed::embed("host")
}
