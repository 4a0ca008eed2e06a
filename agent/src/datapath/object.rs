//! The eBPF object files, embedded by the build script.

/// ELF object with the programs `snoop`, `gate`, `uplink`, `uplink_xdp`, `leak` and `replicate`,
/// and all maps.
pub static HOST: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/host"));

/// The same programs and maps with tracing: the programs report their decisions through the maps of
/// [`common::trace`].
pub static HOST_TRACED: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/host_traced"));

/// ELF object with the programs `read_enter` and `read_exit`, and the maps of [`common::reads`].
pub static READS: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/reads"));

/// Version of the toolchain that built [`HOST`].
pub const TOOLCHAIN: &str = env!("ROAMCAST_BPF_TOOLCHAIN_USED");
