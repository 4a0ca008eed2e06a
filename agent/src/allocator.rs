//! How the C library's allocator treats large blocks.

#![allow(unsafe_code, reason = "one setting of the C library")]

/// Blocks of so many bytes or more are mapped by themselves, and go back to the kernel when they are freed.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: libc::c_int = 128 << 10;

/// Has large blocks go back to the kernel at once. By itself the allocator stops that with the first large
/// block that is freed, and from then on each thread keeps some: a peer that sends the largest frames there
/// are, on and on, would cost some 10 MiB for each processor.
pub fn return_large_blocks() {
    // SAFETY: the call takes two numbers, and no other thread is there yet. What it returns says only
    // whether memory is saved.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
    }
}
