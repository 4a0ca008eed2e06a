//! Builds the kernel programs of a node into `OUT_DIR/guest`.

fn main() -> anyhow::Result<()> {
    embed::embed(&["guest"], &[])
}
