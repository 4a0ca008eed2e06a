//! Kernel programs that count what QEMU's main thread reads from a TAP. vhost-net reads the same
//! TAP, and the TAP's statistics count the reads of both.
//!
//! | program | hook | task |
//! |---|---|---|
//! | `read_enter` | raw tracepoint `sys_enter` | notes the TAP that the thread begins to read |
//! | `read_exit` | raw tracepoint `sys_exit` | counts the read when it returned a frame |
//!
//! Both programs look at one thread ([`common::reads::Reader`]), so no other run writes the same
//! entries at the same time.
//!
//! # Minimum kernel version
//!
//! 5.7, for `bpf_get_ns_current_pid_tgid`.

// On other targets the program has an empty `main`, so that lints can read the crate.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(
    unsafe_code,
    reason = "the kernel is asked, and map values are reached, through raw pointers"
)]

use aya_ebpf::bindings::bpf_pidns_info;
use aya_ebpf::btf_maps::{Array, HashMap};
use aya_ebpf::helpers::{bpf_get_ns_current_pid_tgid, bpf_probe_read_kernel};
use aya_ebpf::macros::{btf_map, raw_tracepoint};
use aya_ebpf::programs::RawTracePointContext;
use common::reads::{MAX_DESCRIPTORS, Reader};

#[btf_map]
static READER: Array<Reader, 1> = Array::new();
#[btf_map]
static READS: HashMap<u32, u64, { MAX_DESCRIPTORS as usize }> = HashMap::new();
#[btf_map]
static READING: Array<u32, 1> = Array::new();

#[raw_tracepoint]
fn read_enter(ctx: RawTracePointContext) -> i32 {
    let Some(reader) = READER.get(0) else {
        return 0;
    };
    let call: u64 = ctx.arg(1);
    if call != reader.read || !is_current(reader) {
        return 0;
    }
    let registers: u64 = ctx.arg(0);
    let argument = (registers + reader.argument_at) as *const u64;
    // SAFETY: the helper accepts any address, and fails on an unmapped one.
    let Ok(descriptor) = (unsafe { bpf_probe_read_kernel(argument) }) else {
        return 0;
    };
    // The kernel takes the descriptor as `unsigned int`.
    let descriptor = descriptor as u32;
    // SAFETY: the reference is dropped at once.
    let is_counted = unsafe { READS.get(descriptor) }.is_some();
    set_reading(if is_counted { descriptor + 1 } else { 0 });
    0
}

#[raw_tracepoint]
fn read_exit(ctx: RawTracePointContext) -> i32 {
    let (Some(reading), Some(reader)) = (READING.get(0), READER.get(0)) else {
        return 0;
    };
    // The usual case: one load per system call of the host.
    if *reading == 0 || !is_current(reader) {
        return 0;
    }
    let descriptor = *reading - 1;
    set_reading(0);
    let returned: i64 = ctx.arg(1);
    if returned > 0
        && let Some(reads) = READS.get_ptr_mut(descriptor)
    {
        // SAFETY: only the one thread reaches this line.
        unsafe { *reads += 1 };
    }
    0
}

/// Whether the current thread is the one to count.
#[inline(always)]
fn is_current(reader: &Reader) -> bool {
    let mut info = bpf_pidns_info { pid: 0, tgid: 0 };
    // SAFETY: the helper writes `size` bytes to a variable of that size.
    let failed = unsafe {
        bpf_get_ns_current_pid_tgid(
            reader.namespace_device,
            reader.namespace_inode,
            &raw mut info,
            size_of::<bpf_pidns_info>() as u32,
        )
    };
    failed == 0 && info.pid == reader.thread
}

#[inline(always)]
fn set_reading(value: u32) {
    if let Some(reading) = READING.get_ptr_mut(0) {
        // SAFETY: only the one thread reaches this line.
        unsafe { *reading = value };
    }
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
