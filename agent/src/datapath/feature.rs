//! What the kernel can do: found out by trying, since distributions carry features back to kernels of
//! any version.

use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported};

use super::{DatapathError, sys};

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
pub(super) fn tcx() -> bool {
    match sys::tcx_programs(LOOPBACK, true) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            tracing::info!(
                "The kernel has no TCX; programs are attached by filters of qdiscs, and the cut of \
                 a VM without vhost-net may be one frame early"
            );
            false
        }
        // Without the right to ask there is none to load programs either, which says so.
        Ok(_) | Err(_) => true,
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
