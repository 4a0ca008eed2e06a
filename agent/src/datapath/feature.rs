//! What the kernel can do: found out by trying, since distributions carry features back to kernels of
//! any version.

use aya::programs::{ProgramError, ProgramType, SchedClassifier, TcAttachType};
use aya::sys::{BpfHelper, SyscallError, is_helper_supported};
use nix::net::if_::if_indextoname;

use super::DatapathError;

/// Interface index of the loopback, in every network namespace.
const LOOPBACK: u32 = 1;

/// Helpers that every set of programs uses: name, and the version that brought it.
const HELPERS: [(BpfHelper, &str, &str); 2] = [
    (
        BpfHelper::BPF_FUNC_ringbuf_output,
        "bpf_ringbuf_output for kernel programs",
        "5.8",
    ),
    (
        BpfHelper::BPF_FUNC_loop,
        "bpf_loop for kernel programs",
        "5.17",
    ),
];

/// Whether programs can be attached by TCX: the kernel is asked who is there on the loopback.
pub(super) fn tcx() -> Result<bool, DatapathError> {
    let loopback = if_indextoname(LOOPBACK).map_err(|errno| {
        DatapathError::Load(format!("Cannot name the loopback interface: {errno}"))
    })?;
    let loopback = loopback.to_string_lossy();
    match SchedClassifier::query_tcx(&loopback, TcAttachType::Ingress) {
        Ok(_) => Ok(true),
        Err(ProgramError::SyscallError(SyscallError { io_error, .. }))
            if io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            tracing::info!(
                "The kernel has no TCX; programs are attached by filters of qdiscs, and the cut of \
                 a VM without vhost-net may be one frame early"
            );
            Ok(false)
        }
        // Without the right to ask there is none to load programs either, which says so.
        Err(_) => Ok(true),
    }
}

/// What the kernel lacks, after it has refused the programs.
pub(super) fn missing() -> Option<DatapathError> {
    HELPERS
        .into_iter()
        .find(|(helper, ..)| {
            matches!(
                is_helper_supported(ProgramType::SchedClassifier, *helper),
                Ok(false)
            )
        })
        .map(|(_, feature, version)| DatapathError::KernelLacks { feature, version })
}
