//! With the feature `programs`, builds the kernel programs of the host into `OUT_DIR/host`, those that tell their decisions into
//! `OUT_DIR/host_traced`, and those that count what QEMU reads into `OUT_DIR/reads`.

fn main() -> anyhow::Result<()> {
    // Mapping and migration control servers have no kernel programs, and need no compiler for them.
    if std::env::var_os("CARGO_FEATURE_PROGRAMS").is_none() {
        return Ok(());
    }
    let traced = embed::Variant {
        name: "host_traced",
        object: "host",
        feature: "trace",
    };
    embed::embed(&["host", "reads"], &[traced])
}
