//! Linker options of the kernel programs.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // LLVM's block placement moves the head of a loop after its end, so that the end falls through
    // to the head. Older kernels, among them 6.1, reject a loop that closes by a fall-through.
    if std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "bpf") {
        println!("cargo::rustc-link-arg-bins=--llvm-args=-disable-block-placement");
    }
}
