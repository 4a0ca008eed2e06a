//! Builds the kernel programs of the host into `OUT_DIR/host`, and those that tell their decisions
//! into `OUT_DIR/host_traced`.

#![allow(unsafe_code, reason = "setting an environment variable is unsafe")]

#[path = "../agent-ebpf/build/embed.rs"]
mod embed;

fn main() -> anyhow::Result<()> {
    let traced = embed::Variant {
        name: "host_traced",
        feature: "trace",
    };
    embed::embed("host", &[traced])
}
