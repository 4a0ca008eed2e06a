//! Program test-run with options that aya 0.14 lacks.
#![allow(unsafe_code, reason = "bpf(2) is a raw system call")]

use std::io;
use std::os::fd::RawFd;

const BPF_PROG_TEST_RUN: libc::c_int = 10;
/// Linux 6.15: the packet carries the sum over all of its bytes, and the kernel checks afterwards
/// whether that sum is still correct.
const TEST_SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;

/// Test part of `union bpf_attr`: 80 bytes.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    program: u32,
    result: u32,
    input_bytes: u32,
    output_bytes: u32,
    input: u64,
    output: u64,
    repeat: u32,
    duration: u32,
    context_input_bytes: u32,
    context_output_bytes: u32,
    context_input: u64,
    context_output: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    pad: u32,
}

/// Runs a TC program repeatedly on a frame. Returns the last verdict. Several threads may share the
/// descriptor.
pub fn verdict(program: RawFd, frame: &[u8], repeat: u32) -> io::Result<i32> {
    let mut attributes = Attributes {
        program: program.unsigned_abs(),
        input_bytes: u32::try_from(frame.len()).map_err(io::Error::other)?,
        input: frame.as_ptr() as u64,
        repeat,
        ..Attributes::default()
    };
    run(&mut attributes)?;
    Ok(attributes.result.cast_signed())
}

/// The buffers that the attributes name must be live.
fn run(attributes: &mut Attributes) -> io::Result<()> {
    // SAFETY: the attributes are live and their length is given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_TEST_RUN,
            &raw mut *attributes,
            size_of::<Attributes>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Runs a TC program on a packet with such a sum. Returns the resulting packet, or the error if its
/// sum is wrong; `None` if the kernel lacks the option.
pub fn with_sum(program: RawFd, frame: &[u8]) -> Option<io::Result<Vec<u8>>> {
    let mut output = vec![0; frame.len()];
    let length = u32::try_from(frame.len()).ok()?;
    let mut attributes = Attributes {
        program: program.unsigned_abs(),
        input_bytes: length,
        output_bytes: length,
        input: frame.as_ptr() as u64,
        output: output.as_mut_ptr() as u64,
        repeat: 1,
        flags: TEST_SKB_CHECKSUM_COMPLETE,
        ..Attributes::default()
    };
    match run(&mut attributes) {
        Ok(()) => Some(Ok(output)),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => None,
        Err(error) => Some(Err(error)),
    }
}
