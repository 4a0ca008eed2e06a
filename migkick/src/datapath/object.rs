//! The eBPF object file, embedded by the build script.

/// ELF object with the programs `mat_out` and `mat_in`, and all maps.
pub static GUEST: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/guest"));

/// Version of the toolchain that built [`GUEST`].
pub const TOOLCHAIN: &str = env!("ROAMCAST_BPF_TOOLCHAIN_USED");
