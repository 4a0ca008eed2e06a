//! The kernel programs, embedded by the build script.

/// ELF object with the programs `mat_out` and `mat_in`, and all maps.
pub static GUEST: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/guest"));

/// The toolchain that built [`GUEST`].
pub const TOOLCHAIN: &str = env!("ROAMCAST_BPF_TOOLCHAIN_USED");
