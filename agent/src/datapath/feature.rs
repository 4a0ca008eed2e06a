//! Features of the kernel, found by trial: distributions backport features to kernels of any
//! version.

use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported};
use linux::bpf::has_tcx;

use super::DatapathError;

/// Helpers that every set of programs calls: name, and first kernel version.
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

/// Whether the kernel has TCX.
pub(super) fn tcx() -> bool {
    let has_tcx = has_tcx();
    if !has_tcx {
        tracing::info!(
            "The kernel has no TCX; programs are attached by filters of qdiscs, and the cut of a VM \
             without vhost-net may be one frame early"
        );
    }
    has_tcx
}

/// After the kernel has refused the programs: the helper that it lacks, if any.
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
